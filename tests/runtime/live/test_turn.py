"""Where a text ends and what an answer consists of, as the model's own files say it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from moepolicy import find_policy
from moerun.errors import RunError
from moerun.live.runner import Runner
from moerun.live.sampling import Sampling
from moerun.live.turn import model_ends, turn_of
from moerun.live.work import Generated
from moerun.serving.chat import encode_chat
from moerun.settings import Settings
from moerun.store.pack import pack
from support.chat_templates import (
    STYLES,
    scripted,
    spelled,
    styled_checkpoint,
    styled_store,
    tokenizer_of,
)

CPU = torch.device("cpu")
ASKED = [{"role": "user", "content": "Who goes there?"}]
THINKING = ("glm", "qwen3", "prefilled", "r1", "harmony")


class Heard:
    """What a generation hands on."""

    def __init__(self) -> None:
        self.answer: list[str] = []
        self.reasoning: list[str] = []


@pytest.fixture(scope="module")
def runners(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A runner of the bundled model with the tokenizer of a style; made once each."""
    made: list[Runner] = []

    @cache
    def runner(style: str) -> Runner:
        store = styled_store(style, tmp_path_factory.mktemp(style))
        made.append(Runner(store, Settings(find_policy("lru"), slots=8)))
        return made[-1]

    yield runner
    for each in made:
        each.close()
        each.store.close()


def answered(runner: Runner, writes: str, *stops: str, heard: Heard | None = None) -> Generated:
    """A chat's answer of a model that writes ``writes``, and would go on."""
    tokenizer, heard = runner.tokenizer, heard or Heard()
    generation = runner.generation(heard.answer.append, heard.reasoning.append)
    sampling = Sampling(max_new_tokens=200, stop_strings=stops, turn=turn_of(tokenizer))
    with scripted(runner.model, spelled(tokenizer, writes)):
        done = generation.run(encode_chat(tokenizer, ASKED, CPU), sampling)
    assert "".join(heard.answer) == done.text
    assert "".join(heard.reasoning) == done.reasoning
    return done


@pytest.mark.parametrize("style", STYLES)
def test_the_ends_of_a_turn_are_those_the_template_writes(style: str) -> None:
    tokenizer = tokenizer_of(style)
    ends = tokenizer.convert_ids_to_tokens(list(turn_of(tokenizer).end_ids))
    assert tuple(ends) == STYLES[style].ends


def test_without_a_template_or_with_one_that_refuses_there_is_no_turn() -> None:
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = None
    assert turn_of(tokenizer).end_ids == ()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    turn = turn_of(tokenizer)
    assert (turn.end_ids, turn.response_template) == ((), None)


@pytest.mark.parametrize("style", STYLES)
def test_a_chat_ends_with_its_turn_and_shows_no_special_token(runners: Any, style: str) -> None:
    for end in STYLES[style].ends:
        writes = "</think>Tis I." if style in ("prefilled", "r1") else "Tis I."
        if style == "harmony":
            writes = "<|channel|>final<|message|>Tis I."
        done = answered(runners(style), f"{writes}{end} and on it goes")
        assert (done.text, done.reasoning, done.ending) == ("Tis I.", "", "stop")
        assert done.new_tokens == len(spelled(runners(style).tokenizer, writes)) + 1


def test_a_raw_text_is_not_ended_by_a_turn(runners: Any) -> None:
    runner = runners("chatml")
    with scripted(runner.model, spelled(runner.tokenizer, "One<|im_end|>two three")):
        done = runner.generation().run(runner.encode("a"), Sampling(max_new_tokens=4))
    assert done.ending == "length"
    assert done.new_tokens == 4


def test_the_model_ends_with_what_any_of_its_files_names(tmp_path: Path) -> None:
    """Config, generation config and tokenizer each name another token."""
    folder = styled_checkpoint("llama3", tmp_path / "model", eos="<|eot_id|>")
    tokenizer = tokenizer_of("llama3")
    first, second, third = tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|eom_id|>", "the"])
    for name, ids in (("config.json", second), ("generation_config.json", [third])):
        described = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**described, "eos_token_id": ids}))
    with (
        pack(folder, tmp_path / "store") as store,
        Runner(store, Settings(find_policy("lru"), slots=8)) as runner,
    ):
        assert set(model_ends(runner.model, runner.tokenizer)) == {first, second, third}
        for end in (first, second, third):
            script = [*spelled(tokenizer, "Good day"), end, *spelled(tokenizer, "and on")]
            with scripted(runner.model, script):
                done = runner.generation().run(runner.encode("a"), Sampling(max_new_tokens=50))
            assert (done.ending, done.token_ids[-1]) == ("stop", end)
            with scripted(runner.model, script):
                on = runner.generation().run(
                    runner.encode("a"), Sampling(max_new_tokens=12, stop=False)
                )
            assert on.new_tokens == 12


def test_ends_beyond_the_vocabulary_are_none() -> None:
    class Model:
        config = generation_config = type(
            "Config", (), {"eos_token_id": [-1, 5, 700], "get_text_config": lambda self: self}
        )()

        def get_input_embeddings(self) -> Any:
            return torch.nn.Embedding(10, 2)

    assert model_ends(Model(), None) == (5,)


@pytest.mark.parametrize("style", ["chatml", "harmony"])
def test_a_stop_string_may_be_a_special_token_or_lie_across_one(runners: Any, style: str) -> None:
    special = STYLES[style].special[0]
    done = answered(runners(style), f"One two{special}user three", special)
    assert (done.text, done.ending) == ("One two", "stop")
    done = answered(runners(style), f"One two{special}user three", f"wo{special}us")
    assert (done.text, done.ending) == ("One t", "stop")
    begun = answered(runners(style), f"One{special}é wo{STYLES[style].ends[0]}", f"{special}é wor")
    assert begun.text == "Oneé wo"  # it only began like the stop string


WRITTEN = {
    "glm": "<think>Who asks?</think>\nTis I.<|user|>",
    "qwen3": "<think>\nWho asks?\n</think>\n\nTis I.<|im_end|>",
    "prefilled": "Who asks?\n</think>\n\nTis I.<|im_end|>",
    "r1": "Who asks?\n</think>\n\nTis I.<|sentence_end|>",
    "harmony": "<|channel|>analysis<|message|>Who asks?<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Tis I.<|return|>",
}


@pytest.mark.parametrize("style", THINKING)
def test_reasoning_is_kept_apart_from_the_answer(runners: Any, style: str) -> None:
    heard = Heard()
    done = answered(runners(style), f"{WRITTEN[style]} and on", heard=heard)
    assert (done.reasoning, done.text, done.ending) == ("Who asks?", "Tis I.", "stop")
    assert len(heard.answer) > 1  # it streams
    assert len(heard.reasoning) > 1


@pytest.mark.parametrize("style", THINKING)
def test_reasoning_that_is_cut_short_is_no_answer(runners: Any, style: str) -> None:
    opened = WRITTEN[style].partition("asks")[0]
    done = answered(runners(style), f"{opened}asks <@>", "<@>")
    assert (done.reasoning, done.text, done.ending) == ("Who asks ", "", "stop")


def test_each_message_of_a_channel_is_a_paragraph_and_none_is_lost(runners: Any) -> None:
    begin = "<|start|>assistant<|channel|>"
    writes = (
        f"<|channel|>analysis<|message|>One.<|end|>{begin}analysis<|message|>Two.<|end|>"
        f"{begin}commentary<|message|>Three.<|end|>{begin}final<|message|>Four.<|return|>"
    )
    done = answered(runners("harmony"), writes)
    assert (done.reasoning, done.text) == ("One.\nTwo.", "Three.\nFour.")
    assert answered(runners("harmony"), "No channel.<|return|>").text == "No channel."


def test_a_response_template_of_the_tokenizer_comes_first(runners: Any) -> None:
    runner = runners("chatml")
    declared = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"thinking": {"open": "((", "close": "))"}, "content": {}},
    }
    runner.tokenizer.response_template = declared
    try:
        done = answered(runner, "((Who asks?))Tis I.<|im_end|>")
        assert (done.reasoning, done.text) == ("Who asks?", "Tis I.")
        runner.tokenizer.response_template = {"fields": {}}
        with pytest.raises(RunError, match=r"response_template cannot be used: .*fields"):
            turn_of(runner.tokenizer)
    finally:
        runner.tokenizer.response_template = None


def test_a_template_without_reasoning_has_one_channel() -> None:
    for style in set(STYLES) - set(THINKING):
        assert turn_of(tokenizer_of(style)).response_template is None
