"""How code stands on a narrow page: commands wrap, aligned columns scroll, names stay whole."""

from __future__ import annotations

import re
from collections import Counter
from html import unescape
from typing import Any

BLOCK = re.compile(r"<pre>(?P<code>.*?)</pre>", re.DOTALL)
# In a paragraph: a block's <code> follows <pre> or the anchor of its first line.
NAME = re.compile(r"(?<!<pre>)(?<!</span>)<code>(?P<name>[^<\n]{1,28})</code>")
COMMENT = re.compile(r"\S {2,}(?=# )")
MANY = 4
COLUMNS = re.compile(r"\S {2,}(?!#)\S")
# A browser breaks lines behind a hyphen: --precision became - and -precision.
HYPHENATED = re.compile(r"(?<![\w&/.-])-{0,2}\w+(?:-\w+)+|(?<![\w&/.-])--\w+")


def on_page_content(html: str, **_: Any) -> str:
    """Give blocks that may wrap the class "wraps", and names "whole": site.css has both."""
    html = BLOCK.sub(_wrapping, html)
    return NAME.sub(r'<code class="whole">\g<name></code>', html)


def _wrapping(found: re.Match[str]) -> str:
    """A block with its class, and its hyphenated words kept whole."""
    parts = re.split("(<[^>]*>)", found["code"])
    if has_columns(unescape("".join(parts[::2]))):
        return found[0]
    parts[::2] = [HYPHENATED.sub(r'<span class="whole">\g<0></span>', text) for text in parts[::2]]
    return f'<pre class="wraps">{"".join(parts)}</pre>'


def has_columns(text: str) -> bool:
    """Whether lines hold columns that wrapping would break. Comments behind code are one where
    many of them begin in the same place."""
    lines = text.splitlines()
    places = Counter(found.end() for line in lines if (found := COMMENT.search(line)))
    many = max(places.values(), default=0) >= MANY
    return many or any(COLUMNS.search(line) for line in lines)
