"""Which texts a corpus has and how they are cut."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from moerun.errors import RunError
from moetrace.corpus import Document, check_corpus, cut_windows, read_documents
from moetrace.model import Checkpoint


def texts(*paths: Path, field: str | None = None) -> list[str]:
    return [document.text for document in read_documents(paths, field)]


def test_a_folder_gives_its_text_files_in_order(corpus: Path) -> None:
    (corpus / ".hidden").mkdir()
    (corpus / ".hidden" / "x.txt").write_text("not this")
    (corpus / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    found = texts(corpus)
    assert [text[:6] for text in found] == ["It was", "def ad"]


def test_a_file_named_by_hand_must_be_text(corpus: Path) -> None:
    with pytest.raises(RunError, match=r"c\.bin is no text"):
        texts(corpus / "c.bin")


def test_json_lines_give_the_field(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(
        "\n".join(json.dumps({"q": f"question {i}", "n": i}) for i in range(3)) + "\n\n"
    )
    assert texts(file, field="q") == ["question 0", "question 1", "question 2"]


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"q": "a", "n": 1}', None, r"line 1: say with --field .* there are: q$"),
        ('{"q": "a", "n": 1}', "n", r"line 1: has no text under 'n'; .* are: q$"),
        ('{"q": "a"', "q", r"line 1: is not JSON"),
        ("[1]", "q", r"line 1: is not a JSON object"),
    ],
)
def test_json_lines_without_the_text_are_named(
    tmp_path: Path, line: str, field: str | None, message: str
) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(RunError, match=message):
        texts(file, field=field)


def test_json_lines_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    file.write_bytes(b'{"q": "a"}\n{"q": "\xff"}\n')
    with pytest.raises(RunError, match=r"chat\.jsonl, line 2: is not JSON"):
        texts(file, field="q")


def test_a_field_needs_json_lines(corpus: Path) -> None:
    with pytest.raises(RunError, match=r"--field text: the corpus has no \.jsonl"):
        texts(corpus, field="text")


def test_documents_are_cut_into_windows(tiny: Checkpoint) -> None:
    documents = [Document("a", "one two three " * 30), Document("b", "four")]
    windows = cut_windows(documents, tiny.tokenizer, 16)
    ids = tiny.tokenizer(documents[0].text)["input_ids"]
    whole = -(-len(ids) // 16)
    assert [i for window in windows.sequences[:whole] for i in window] == ids
    assert [len(w) for w in windows.sequences[: whole - 1]] == [16] * (whole - 1)
    assert tiny.tokenizer.decode(windows.sequences[whole]) == "four"
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document.text).to_bytes(8, "little") + document.text.encode())
    assert windows.digest == digest.hexdigest()


def test_max_tokens_stops_in_the_middle(tiny: Checkpoint) -> None:
    documents = [Document("a", "one two three " * 30)] * 3
    assert cut_windows(documents, tiny.tokenizer, 16, max_tokens=100).n_tokens == 100


def test_an_empty_corpus_is_refused(tiny: Checkpoint) -> None:
    with pytest.raises(RunError, match=r"the corpus is empty: no text in a\.txt$"):
        cut_windows([Document("a.txt", "")], tiny.tokenizer, 16)
    with pytest.raises(RunError, match=r"no text in a\.txt and 1 more$"):
        cut_windows([Document("a.txt", ""), Document("b.txt", "")], tiny.tokenizer, 16)
    with pytest.raises(RunError, match="it has no file with text in it"):
        cut_windows([], tiny.tokenizer, 16)


def test_a_folder_without_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"the corpus is empty: no files in {tmp_path}"):
        check_corpus([tmp_path])
