"""What a model thinks before it answers, apart from the answer: over HTTP and on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from moepolicy import find_policy
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.serving.terminal import TerminalChat
from moerun.settings import Settings
from support.chat_templates import scripted, spelled, styled_store
from support.serving import posted

WRITES = (
    "<|channel|>analysis<|message|>Who asks?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Tis I.<|return|> and on"
)
USER = {"role": "user", "content": "Who goes there?"}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    store = styled_store("harmony", tmp_path_factory.mktemp("harmony"))
    with store, Runner(store, Settings(find_policy("lru"), slots=8)) as made:
        yield made


def test_a_whole_answer_has_its_reasoning_beside_its_content(runner: Runner) -> None:
    choice = posted(runner, WRITES, [USER])
    assert choice["message"]["content"] == "Tis I."
    assert choice["message"]["reasoning_content"] == "Who asks?"
    assert choice["finish_reason"] == "stop"


def test_a_stream_has_reasoning_in_pieces_of_its_own(runner: Runner) -> None:
    chunks = posted(runner, WRITES, [USER], stream=True)
    deltas = [chunk["delta"] for chunk in chunks]
    assert all(len(delta) == 1 for delta in deltas[1:-1])
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Who asks?"
    assert "".join(delta.get("content", "") for delta in deltas) == "Tis I."
    assert chunks[-1]["finish_reason"] == "stop"


def test_an_answer_without_reasoning_says_none(runner: Runner) -> None:
    choice = posted(runner, "<|channel|>final<|message|>Tis I.<|return|>", [USER])
    assert choice["message"] == {"role": "assistant", "content": "Tis I.", "refusal": None}


def test_an_answer_may_come_back_as_it_was_given(runner: Runner) -> None:
    message = posted(runner, WRITES, [USER])["message"]
    choice = posted(runner, WRITES, [USER, message, USER])
    assert choice["message"] == message


def test_a_special_token_stops_an_answer(runner: Runner) -> None:
    choice = posted(runner, WRITES, [USER], stop="<|end|>")
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert choice["message"]["reasoning_content"] == "Who asks?"


class Lines:
    def __init__(self, *lines: str) -> None:
        self._lines = [f"{line}\n" for line in lines]

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        return self._lines.pop(0) if self._lines else ""


def test_a_chat_has_the_answer_on_stdout_and_reasoning_on_stderr(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Lines("Who goes there?"))
    with scripted(runner.model, spelled(runner.tokenizer, WRITES)):
        assert not TerminalChat(runner, Sampling(max_new_tokens=90), None).hold()
    said, errors = capsys.readouterr()
    assert said == "Tis I.\n"
    assert errors.startswith("(reasoning: Who asks?)\n")
    with scripted(runner.model, spelled(runner.tokenizer, WRITES)):
        monkeypatch.setattr(sys, "stdin", Lines("Who goes there?"))
        cut = len(spelled(runner.tokenizer, WRITES.partition("?")[0]))
        TerminalChat(runner, Sampling(max_new_tokens=cut), None).hold()
    said, errors = capsys.readouterr()
    assert said == "\n"
    assert errors.startswith(f"(reasoning: Who asks)\n({cut} tokens, ")
