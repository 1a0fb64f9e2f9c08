"""Which part of one stretch of memory each record of two sizes lies in, with nothing wasted."""

from __future__ import annotations


class Places:
    """Numbered places of either size: the one size from the memory's start on, the other from its
    end, all room that is left between them.

    A place given up amid others of its size serves that size at once. Before the other size can
    have the room, the outermost record (the one next to the middle) must move there.
    """

    def __init__(self, n_bytes: int, sizes: tuple[int, int]) -> None:
        """``sizes`` in bytes, by whether a record is one of the lower precision."""
        self._n_bytes = n_bytes
        self._sizes = sizes
        self._extent = [0, 0]  # places from the memory's edge to the middle, holes among them
        self._holes: tuple[list[int], list[int]] = ([], [])

    def at(self, low: bool, place: int) -> slice:
        """Where in memory a place is, in bytes."""
        size = self._sizes[low]
        begin = self._n_bytes - (place + 1) * size if low else place * size
        return slice(begin, begin + size)

    def take(self, low: bool) -> int | None:
        """A place, a hole if there is one; None where there is no room."""
        if self._holes[low]:
            return self._holes[low].pop()
        used = sum(n * size for n, size in zip(self._extent, self._sizes, strict=True))
        if self._n_bytes - used < self._sizes[low]:
            return None
        self._extent[low] += 1
        return self._extent[low] - 1

    def give_up(self, low: bool, place: int) -> None:
        holes = self._holes[low]
        holes.append(place)
        while self._extent[low] - 1 in holes:
            self._extent[low] -= 1
            holes.remove(self._extent[low])

    def outermost(self, low: bool) -> int | None:
        """The place whose record would have to move for the middle to grow; None without holes."""
        return self._extent[low] - 1 if self._holes[low] else None
