"""The pages of the site that lie outside docs/: README.md is its first page, notebooks are others.

A link to one of them, in them or in docs/, becomes a link to the page. Links to other files of the
repository are refused by `mkdocs build --strict`, as links to pages that are not there.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "runtime/moerun/models/tiny/README.md": "tiny.md",
    "traces/moeroute/samples/README.md": "samples.md",
    "examples/choose-a-policy.ipynb": "examples/choose-a-policy.md",
    "examples/policy-of-your-own.ipynb": "examples/policy-of-your-own.md",
}
FILES = {page: file for file, page in PAGES.items()}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of PAGES."""
    for file, page in PAGES.items():
        text = (ROOT / file).read_text(encoding="utf-8")
        if file.endswith(".ipynb"):
            text = notebook(text)
        files.append(File.generated(config, page, content=relinked(text, file, page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links out of docs/ into links to the pages made of those files."""
    uri = page.file.src_uri
    return markdown if uri in FILES else relinked(markdown, f"docs/{uri}", uri)


def notebook(text: str) -> str:
    """A notebook as Markdown, with the outputs that it was saved with."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced("python", source))
        parts += [_output(each) for each in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def fenced(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def _output(output: Any) -> str:
    """Printed text as it is; tables and pictures as HTML, but none that brings scripts."""
    shown = "".join(output.get("data", {}).get("text/html", ""))
    if shown and "<script" not in shown:
        return "<div>" + "".join(line.strip() for line in shown.splitlines()) + "</div>"
    plain = output.get("text") or output.get("data", {}).get("text/plain", "")
    return fenced("text", "".join(plain)) if plain else ""


def relinked(text: str, file: str, page: str) -> str:
    """``text`` of the repository's ``file`` with its links as they are from ``page``."""

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        if "://" in target:
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
        place = PAGES.get(there)
        if place is None and there.startswith("docs/"):
            place = there.removeprefix("docs/")
        if place is None:
            return match[0]
        return f"]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor})"

    return re.sub(r"\]\(([^)#\s]+)(#[^)\s]*)?\)", link, text)
