"""Conversations: what the model is given, and `moerun chat` on pipes and on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.checkpoint.families import find_experts
from moerun.checkpoint.hub import resolve
from moerun.errors import RunError
from moerun.live.generate import Generation
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.offload.load import load_tokenizer
from moerun.serving.chat import Conversation, Lead, encode_chat, plain_text, stops_of
from moerun.serving.terminal import TerminalChat
from moerun.settings import Settings
from moerun.store.expert_store import ExpertStore
from moerun.store.pack import pack

PATIENCE_S = 120
CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExpertStore]:
    with pack(resolve("tiny"), tmp_path_factory.mktemp("chat") / "store", name="tiny") as packed:
        yield packed


@pytest.fixture
def runner(store: ExpertStore) -> Iterator[Runner]:
    with Runner(store, Settings(find_policy("lru-spec"), slots=3)) as made:
        yield made


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(resolve("tiny"))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_without_a_template_a_conversation_is_a_script() -> None:
    messages = [
        {"role": "system", "content": "Two friends talk."},
        user("Hello\n"),
        {"role": "assistant", "content": " Good day."},
        user("And?"),
    ]
    expected = "Two friends talk.\nUser: Hello\nAssistant: Good day.\nUser: And?\nAssistant:"
    assert plain_text(messages) == expected


def test_a_template_makes_the_prompt_and_its_refusal_is_one_line(tokenizer: Any) -> None:
    assert stops_of(tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert stops_of(tokenizer) == ()
    ids = encode_chat(tokenizer, [user("hi")], CPU)
    assert tokenizer.decode(ids[0]) == "[user]hi[assistant]"
    with pytest.raises(RunError, match="chat template refuses the messages: no system"):
        encode_chat(tokenizer, [{"role": "system", "content": "x"}], CPU)


def test_oldest_turns_go_first_and_the_system_message_stays(tokenizer: Any) -> None:
    talk = Conversation(tokenizer, CPU, "Be brief.")
    for i in range(6):
        talk.ask(f"question {i}")
        talk.answer(f" answer {i}\n")
    talk.ask("the last")
    whole = talk.prompt(None)
    assert whole.dropped == 0
    room = whole.ids.shape[1] - 1
    cut = talk.prompt(room)
    assert cut.dropped == 1
    assert cut.ids.shape[1] <= room
    text = tokenizer.decode(cut.ids[0])
    assert text.startswith("Be brief.\nUser: question 1\nAssistant: answer 1\nUser: question 2\n")
    assert talk.prompt(room).dropped == 0  # gone for good
    least = talk.prompt(3)
    assert least.dropped == 5
    assert tokenizer.decode(least.ids[0]) == "Be brief.\nUser: the last\nAssistant:"


def test_a_lead_begins_with_the_first_letter() -> None:
    heard: list[str] = []
    lead = Lead(heard.append)
    for piece in (" ", "\n", " a", " b"):
        lead(piece)
    assert heard == ["a", " b"]


def test_a_cancelled_generation_leaves_the_cache_fit(runner: Runner) -> None:
    ids = runner.encode("It was the best of times")
    expected = runner.generation().run(ids, Sampling(max_new_tokens=8)).token_ids
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        generation.cancel()

    generation = runner.generation(stop)
    cut = generation.run(ids, Sampling(max_new_tokens=8))
    assert (cut.ending, cut.token_ids) == ("cancelled", expected[:1])
    early: Generation = runner.generation()
    early.cancel()  # before the first layer of the prompt
    none = early.run(ids, Sampling(max_new_tokens=8))
    assert (none.ending, none.new_tokens, none.answers, none.totals.steps) == ("cancelled", 0, 0, 0)
    whole = runner.generation().run(ids, Sampling(max_new_tokens=8))
    assert (whole.ending, whole.token_ids) == ("length", expected)
    runner.session.cache.check()


def test_an_error_in_an_expert_is_over_after_a_reset(runner: Runner) -> None:
    ids, sampling = runner.encode("It was the best of times"), Sampling(max_new_tokens=4)
    expected = runner.generation().run(ids, sampling).token_ids
    activation: Any = find_experts(runner.model)[3][1].act_fn

    def fail(*_: object) -> None:
        raise MemoryError("none left")

    whole, activation.forward = activation.forward, fail
    with pytest.raises(MemoryError):
        runner.generation().run(ids, sampling)
    activation.forward = whole
    with pytest.raises(RunError, match="a step was left unfinished"):
        runner.generation().run(ids, sampling)
    runner.session.reset()
    assert runner.generation().run(ids, sampling).token_ids == expected


class Lines:
    """A standard input that is no terminal."""

    def __init__(self, *lines: str) -> None:
        self._lines = [f"{line}\n" for line in lines]

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        return self._lines.pop(0) if self._lines else ""


def held(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, *lines: str, tokens: int = 8, **options: Any
) -> None:
    monkeypatch.setattr(sys, "stdin", Lines(*lines))
    assert not TerminalChat(runner, Sampling(max_new_tokens=tokens, **options), None).hold()


def test_history_makes_later_answers(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held(runner, monkeypatch, "Who are you?", "And I?", "/reset", "And I?")
    said, errors = capsys.readouterr()
    script = "User: Who are you?\nAssistant:"
    sampling = Sampling(max_new_tokens=8, stop_strings=stops_of(runner.tokenizer))

    def answer(prompt: str) -> str:
        return runner.generation().run(runner.encode(prompt), sampling).text.strip()

    first = answer(script)
    second = answer(f"{script} {first}\nUser: And I?\nAssistant:")
    third = answer("User: And I?\nAssistant:")
    assert said.split("\n") == [*f"{first}\n{second}\n{third}".split("\n"), ""]
    assert "forgotten" in errors
    assert errors.count("tokens/s,") == 3


def test_answers_repeat_with_the_seed(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"temperature": 1.2, "seed": 5}
    held(runner, monkeypatch, "Hello", "/reset", "Hello", **options)
    twice = capsys.readouterr().out
    half = len(twice) // 2
    assert twice[:half] == twice[half:]
    held(runner, monkeypatch, "Hello", **options | {"seed": 6})
    assert capsys.readouterr().out != twice[:half]


@pytest.mark.slow
def test_a_full_context_is_said_once(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held(runner, monkeypatch, *["word " * 90] * 8, tokens=2)
    errors = capsys.readouterr().err
    assert errors.count("the context of 512 tokens is full") == 1
    with pytest.raises(RunError, match=r"prompt has \d+ tokens and the model's context is 512"):
        held(runner, monkeypatch, "word " * 600)


def test_commands_and_statistics(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held(runner, monkeypatch, "/stats", "/hlep", "", "Hello", "/quit", "never read", tokens=3)
    said, errors = capsys.readouterr()
    assert said.count("\n") >= 1
    assert "unknown command '/hlep'; there are: /help, /reset, /stats, /memory, /quit" in errors
    assert "0 prompt, 0 new" in errors
    assert re.search(r"tokens +\d+ prompt, 3 new\n$", errors)


def test_at_a_terminal_an_error_ends_the_turn_only(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["word " * 600, "Hello"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))

    def read(*_: object) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert not TerminalChat(runner, Sampling(max_new_tokens=3), None).hold()
    errors = capsys.readouterr().err
    assert "error: the prompt has" in errors
    assert "3 new" in errors


def test_memory_can_be_changed_between_two_messages(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = Settings(find_policy("lru"), memory_bytes=100 << 20, context_tokens=256)
    with Runner(store, chosen) as runner:
        assert (runner.context.slots, runner.limit_tokens) == (8, 256)
        least = runner.plan.least_bytes
        held(runner, monkeypatch, "Who?", f"/memory {least}", "Who?", "/memory 1MiB", "/memory")
        said, errors = capsys.readouterr()
        assert runner.context.slots == 0
        assert runner.plan.budget_bytes == least
    assert "memory unchanged: 1.00 MiB of memory is too little" in errors
    assert errors.count("0 of 8 experts in each of 8 layers") == 2
    assert len(said.strip().splitlines()) >= 2


@pytest.fixture
def terminal(store: ExpertStore) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`moerun chat`, slow, and the end of its terminal where a person sits."""
    person, program = pty.openpty()
    # A shell has its background jobs ignore interrupts, and they would hand that down.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", f"{heard}; from moerun.cli import main; main()", "chat"),
            *(
                "--model",
                str(store.path),
                "--slots",
                "1",
                "--link-gbps",
                "0.05",
                "--max-new-tokens",
                "400",
            ),
        ],
        stdin=program,
        stdout=program,
        stderr=program,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "200"},
    )
    os.close(program)
    yield process, person
    process.kill()
    process.wait()
    os.close(person)


def read_until(terminal: int, what: str) -> str:
    seen, deadline_s = "", time.monotonic() + PATIENCE_S
    while what not in seen:
        assert time.monotonic() < deadline_s, seen
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the program has left
                assert what in seen, seen
    return seen


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_at_the_prompt_leaves(
    terminal: tuple[subprocess.Popen[bytes], int],
) -> None:
    process, person = terminal
    greeting = read_until(person, "> ")
    assert "one message a line; /help has the commands" in greeting
    os.write(person, b"/help\n")
    assert "forget the conversation" in read_until(person, "leave\r\n> ")
    os.write(person, b"Tell me of the house\n")
    read_until(person, "house")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    seen = read_until(person, "\n> ")
    assert re.search(r"\(\d+ tokens, stopped, .* tokens/s", seen)
    # Between printing its prompt and listening, readline would keep a signal for the next key.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    seen = read_until(person, " new (interrupted)")
    assert "Traceback" not in seen
    assert process.wait(PATIENCE_S) == 130
