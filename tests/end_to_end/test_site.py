"""The documentation site: it is built as `make docs` builds it, and its pages need no network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag

import pytest
from support.browser import dom, needs_chromium
from support.pages import ROOT, pages

pytestmark = pytest.mark.slow
BUILT_WITH = ("mkdocs", "material", "mkdocstrings")
# What a browser fetches by itself when it shows a page; links that a reader may follow are not.
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


class Page(NamedTuple):
    """What one page names: where its links lead, what it fetches, and where one can lead to."""

    links: list[str]
    fetched: list[str]
    anchors: set[str]
    text: str


class Reader(HTMLParser):
    """Collects what a page names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.page = Page([], [], set(), text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.page.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.page.links.append(given["href"])
        # "canonical" and the like name an address, and nothing is fetched.
        passive = tag == "link" and given.get("rel") in ("canonical", "prev", "next")
        if FETCHED.get(tag, "") in given and not passive:
            self.page.fetched.append(given[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A proxy that is not there stands for no network."""
    for module in BUILT_WITH:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: mkdocs-material and mkdocstrings-python (extra docs)")
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | nowhere | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def read(site: Path) -> dict[Path, Page]:
    """All pages, by file."""
    files = sorted(site.rglob("*.html"))
    return {file: Reader(file.read_text(encoding="utf-8")).page for file in files}


def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    for name in pages():
        page = name.removeprefix("docs/").replace("README.md", "index.md")
        assert (site / page).with_suffix(".html").is_file(), name


def test_no_page_fetches_anything_over_the_network(site: Path, read: dict[Path, Page]) -> None:
    for file, page in read.items():
        for address in page.fetched:
            assert not re.match("[a-z]+:|//", address.removeprefix("data:")), (file, address)
    for style in site.rglob("*.css"):
        for address in re.findall(r"url\(([^)]*)\)", style.read_text(encoding="utf-8")):
            assert not re.match("[\"']?(https?:|//)", address), (style, address)


def test_links_and_anchors_lead_somewhere(site: Path, read: dict[Path, Page]) -> None:
    for file, page in read.items():
        if file.name == "404.html":  # its links are from the root of a server
            continue
        for link in page.links + page.fetched:
            path, anchor = urldefrag(link)
            if re.match("[a-z]+:", path):
                continue
            there = (file.parent / unquote(path.partition("?")[0])).resolve() if path else file
            assert there.exists(), (file, link)
            if anchor and there.suffix == ".html":
                assert unquote(anchor) in read[there].anchors, (file, link)


def test_the_reference_is_that_of_the_code(read: dict[Path, Page], site: Path) -> None:
    for program, command, option in (
        ("moesim", "moesim compare", "--timeline"),
        ("moerun", "moerun serve", "--max-batch"),
        ("moetrace", "moetrace record", "--horizon"),
    ):
        text = read[site / "reference" / f"{program}.html"].text
        assert command in text
        assert option in text
    machine = read[site / "reference" / "machine.html"].text
    assert "bytes_per_s" in machine
    assert "operations/s" in machine
    trace = read[site / "reference" / "trace.html"].text
    assert "router_logits" in trace
    assert "float16[E]" in trace
    policy = read[site / "reference" / "policy.html"]
    for hook in ("victim", "prefetch", "on_miss", "route", "retain"):
        assert f"moepolicy.Policy.{hook}" in policy.anchors


def test_no_list_has_run_into_a_paragraph(read: dict[Path, Page]) -> None:
    """Markdown for Python wants a blank line where GitHub wants none."""
    for file, page in read.items():
        for paragraph in re.findall(r"<p>(.*?)</p>", page.text, re.DOTALL):
            assert not re.search(r"\n(\d+\.|[-*]) ", paragraph), (file, paragraph)


def test_commands_wrap_and_columns_scroll(read: dict[Path, Page], site: Path) -> None:
    profile = read[site / "machines.html"].text
    assert "<pre>" in profile  # whose entries have their comments in a column
    text = read[site / "guides" / "mixtral-12gb.html"].text
    blocks = {
        unescape(re.sub("<[^>]*>", "", code)): mark
        for mark, code in re.findall(r"<pre( [^>]*)?>(.*?)</pre>", text, re.DOTALL)
    }
    (planned,) = [mark for code, mark in blocks.items() if "slots          6.41 GiB" in code]
    (pack,) = [mark for code, mark in blocks.items() if code.startswith("moerun pack")]
    assert planned == ""
    assert pack == ' class="wraps"'
    assert '<span class="whole">--precision</span> 3bit' in text
    assert '<code class="whole">--plan</code>' in text


@needs_chromium
def test_a_search_finds_pages_without_a_server_and_without_a_network(
    site: Path, tmp_path: Path
) -> None:
    shown = dom(site / "index.html", tmp_path, query="q=belady", wait_ms=10_000)
    found = re.search(r'md-search-result__meta">\s*(\d+) matching', shown)
    assert found is not None
    assert int(found[1]) > 3
