"""Mistakes on the command line, and stores that cannot be used: one clear line and an exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from moerun.checkpoint.hub import resolve
from support.commands import PROMPT, Call, error_line
from support.moe_models import random_model, save_checkpoint


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slots", "2", "policies"), "options stand before 'policies', which does not see them"),
        (("generate", "Once"), "'Once' belongs to no option: give the prompt as --prompt TEXT"),
        (("--prompt", "a", "b"), "'b' belongs to no option"),
    ],
)
def test_words_that_no_option_takes_are_explained(
    moerun: Call, arguments: tuple[str, ...], says: str
) -> None:
    done = moerun(*arguments)
    assert done.returncode == 2
    assert says in " ".join(done.stderr.split())


MISTAKES = [
    (("--policy", "hobbit"), "policy 'hobbit' loads experts at a lower precision"),
    (("--policy", "belady"), "policy 'belady' needs the future of a recorded trace"),
    (("--model", "mixtral-8x7b"), "the name serves --plan and 'moerun bench' alone"),
    (("--device", "cuda:7"), "device 'cuda:7' is not there"),
    (("--memory", "100KiB"), "100.00 KiB of memory is too little: the least that works is"),
    (("--memory", "12"), "more; a number without a unit is bytes: write it as 9GiB or 500MB"),
    (("--prompt", ""), "the prompt is empty"),
    (("--prompt", "word " * 600), "the model's context is 512: shorten it"),
    (("--prompt-file", "/nowhere/prompt"), "/nowhere/prompt: No such file"),
    (("--record", "/nowhere/t.parquet"), "the folder /nowhere does not exist"),
    (("--journal", "/nowhere/j.json"), "the folder /nowhere does not exist"),
    (("--policy", "static", "--calibration", "mixtral-like"), "32 layers"),
]

# What no machine, model or file could make right.
NONSENSE = [
    (("--model", "small"), "there is no model 'small'"),
    (
        ("--plan", "--model", "Qwen3.6-35B-A3B"),
        "did you mean 'qwen3.6-35b-a3b'? `moerun families` lists the",
    ),
    (("--plan", "--model", "qwen3-30b"), "did you mean 'qwen3-30b-a3b'? `moerun families`"),
    (("--policy", "hobbit", "--low", "2bits"), "--low 2bits is neither a precision (native"),
    (("--policy", "lur"), "unknown policy 'lur'; did you mean 'lru'?"),
    (("--device", "gpu"), "unknown device 'gpu'; there are: auto, cpu, cuda, cuda:N"),
    (("--slots", "-1"), "error: --slots must be 0 or more, not -1"),
    (("--scope", "model"), "unknown scope 'model'"),
    (("--memory", "lots"), "'lots' is no amount of memory"),
    (("--precision", "1bit"), "there is no precision '1bit'"),
    (("--streams", "9"), "error: --streams must be 1, 2 or 3, not 9"),
    (("--threads", "0"), "error: --threads must be 1 or more, not 0"),
    (("--link-gbps", "0"), "error: --link-gbps must be above 0"),
    (("--temperature", "-1"), "error: --temperature must be 0 or more"),
    (("--top-p", "2"), "error: --top-p must be above 0 and at most 1"),
    (("--stop", ""), "a stop string must not be empty"),
    (("--max-new-tokens", "0"), "error: --max-new-tokens must be 1 or more"),
    (("--horizon", "-2"), "error: --horizon must be 0 or more"),
    (("--policy", "lru-spec:m=1"), "policy 'lru-spec' has no parameter 'm'"),
    (("--policy", "lru-spec:n=0"), "gate: n must be 1 to 8, not 0"),
    (("--chunk", "3"), "a chunk must be a multiple of"),
]


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [*((1, *mistake) for mistake in MISTAKES), *((2, *value) for value in NONSENSE)],
)
def test_mistakes_get_one_line_and_values_that_cannot_be_exit_with_2(
    moerun: Call, code: int, arguments: tuple[str, ...], says: str
) -> None:
    prompt = () if any(a.startswith("--prompt") for a in arguments) else ("--prompt", PROMPT)
    assert says in error_line(moerun(*prompt, *arguments), code)


def test_a_refused_prompt_leaves_no_recording(moerun: Call, tmp_path: Path) -> None:
    for prompt in ("", "word " * 600):
        error_line(moerun("--prompt", prompt, "--record", tmp_path / "t.parquet"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("--prompt", "a", "--prompt-file", "b"),
        ("--prompt", "a", "--slots", "2", "--memory", "1GiB"),
        ("--prompt", "a", "--slots", "two"),
        ("--nonsense",),
        ("nonsense",),
        ("profile",),
        ("--slots", "2", "policies"),
        ("--slots", "2", "serve"),
        ("serve", "--port", "70000"),
        ("serve", "--queue", "-1"),
        ("serve", "--api-key", ""),
        ("chat", "--slots", "2", "--memory", "1GiB"),
    ],
)
def test_wrong_usage_exits_with_2(moerun: Call, arguments: tuple[str, ...]) -> None:
    done = moerun(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_a_store_of_another_model_is_refused(moerun: Call, tmp_path: Path) -> None:
    other = save_checkpoint(random_model("mixtral"), resolve("tiny"), tmp_path / "other")
    store = tmp_path / "store"
    made = moerun("--store", store, "--prompt", PROMPT, "--max-new-tokens", "2")
    assert made.returncode == 0, made.stderr
    wrong = moerun("--store", store, "--model", other, "--prompt", PROMPT)
    assert "is the store of another model (tiny)" in error_line(wrong)


def test_a_damaged_store_says_which_expert_and_leaves_no_trace(
    moerun: Call, tmp_path: Path
) -> None:
    store, trace = tmp_path / "store", tmp_path / "t.parquet"
    moerun("pack", "tiny", "--out", store)
    victim = store / "experts-00003.safetensors"
    content = bytearray(victim.read_bytes())
    content[-150_000:] = bytes(150_000)
    victim.write_bytes(content)
    done = moerun("--model", store, "--prompt", PROMPT, "--slots", "0", "--record", trace)
    line = error_line(done)
    assert "expert 7 of layer 3 is damaged" in line
    assert str(victim) in line
    assert not trace.exists()
    victim.write_bytes(content[:-1000])
    line = error_line(moerun("--model", store, "--prompt", PROMPT))
    assert f"{victim} has" in line


def test_no_space_for_the_pack_is_said_before_anything_is_written(
    moerun: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    line = error_line(moerun("--prompt", PROMPT))
    assert "0.00 GB free" in line
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
