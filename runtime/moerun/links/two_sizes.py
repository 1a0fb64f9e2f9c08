"""Which part of one stretch of memory each record of two sizes lies in, with nothing wasted."""

from __future__ import annotations

from moerun.links.slot import Sizes, Variant


class TwoSizeAllocator:
    """Numbered blocks, each for a record of one variant: full ones from the memory's start on, low
    ones from its end, and between them what is free for either.

    A block freed amid others of its variant serves that variant at once. Before the other can have
    its bytes, the record in the outermost block (the one next to the middle) must move there.
    """

    def __init__(self, n_bytes: int, sizes: Sizes) -> None:
        self._n_bytes = n_bytes
        self._sizes = sizes
        self._extent = [0, 0]  # blocks from the memory's edge to the middle, free ones among them
        self._free: tuple[list[int], list[int]] = ([], [])  # amid others

    def span(self, variant: Variant, block: int) -> slice:
        """Where in memory a block is, in bytes."""
        size = self._sizes[variant]
        low = variant is Variant.LOW
        begin = self._n_bytes - (block + 1) * size if low else block * size
        return slice(begin, begin + size)

    def allocate(self, variant: Variant) -> int | None:
        """A block, amid others if one is free there; None where there are not so many bytes."""
        if self._free[variant]:
            return self._free[variant].pop()
        used = sum(n * size for n, size in zip(self._extent, self._sizes, strict=True))
        if self._n_bytes - used < self._sizes[variant]:
            return None
        self._extent[variant] += 1
        return self._extent[variant] - 1

    def free(self, variant: Variant, block: int) -> None:
        """Free a block whose record is no longer needed."""
        free = self._free[variant]
        free.append(block)
        while self._extent[variant] - 1 in free:
            self._extent[variant] -= 1
            free.remove(self._extent[variant])

    def outermost(self, variant: Variant) -> int | None:
        """The block whose record must move for the middle to grow; None where nothing is free amid
        the others, so that it could not."""
        return self._extent[variant] - 1 if self._free[variant] else None
