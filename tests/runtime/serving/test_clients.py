"""`moerun serve` and the clients of 2026, each in a process of its own, as its users start it.

The packages of extra [clients]; a test whose client is not installed is skipped.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from moerun.checkpoint.hub import resolve
from support.serving import KEY, Served, bearer, chat, serving

pytestmark = pytest.mark.slow
QUESTIONS: list[tuple[str, list[str]]] = [
    ("It was the best of", [" times", " the", " zebra"]),
    ("The sun rose over the", [" hills", " def", " world"]),
    ("for i in range(", ["10):", " lord"]),
    ("Once upon a", [" time", " self"]),
    ("return self", [".x", " of"]),
    ("The king and the", [" queen", " ="]),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
output_type: {kind}
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATED = """
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
"""


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        find_spec(package) is None, reason=f"{package} (extra [clients]) is not installed"
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in float32: the harness's own run rounds log-probabilities as the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("clients") / "tiny32"
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--slots", "6", "--policy", "lru", "--queue", "32", "--max-new-tokens", "12")
    home = tmp_path_factory.mktemp("home")
    with serving(home, "--model", checkpoint, "--model-name", "tiny", *options) as served:
        yield served


def run(program: str, *arguments: object, **variables: str) -> str:
    """Run a module as a client; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={
            **os.environ,
            **{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": KEY},
            **variables,
        },
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small tasks of the harness: choosing, and generating."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    rows = [{"text": text, "choices": choices, "label": 0} for text, choices in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (
        ("lab_choice", "multiple_choice", CHOICE),
        ("lab_generated", "generate_until", GENERATED),
    ):
        text = TASK.format(name=name, data=data, kind=kind) + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


def evaluated(tasks: Path, out: Path, model: str, arguments: str, *more: str) -> dict[str, Any]:
    """What the harness measured: by task its scores and its samples' answers."""
    names = "lab_generated" if model == "local-chat-completions" else "lab_choice,lab_generated"
    run(
        *("lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", names),
        *("--include_path", tasks, "--log_samples", "--output_path", out, *more),
    )
    found: dict[str, Any] = {}
    for file in out.glob("*/samples_*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        task = "choice" if "lab_choice" in file.name else "generated"
        found[task] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    results = json.loads(next(out.glob("*/results_*.json")).read_text())["results"]
    found["scores"] = {
        f"{task} {name}": value
        for task, row in results.items()
        for name, value in row.items()
        if name.startswith(("acc", "exact")) and "stderr" not in name
    }
    return found


@needs("lm_eval")
def test_the_harness_scores_what_it_scores_with_the_stock_model(
    server: Served, checkpoint: Path, tasks: Path, tmp_path: Path
) -> None:
    arguments = (
        f"base_url={server.url}/v1/completions,model=tiny,tokenizer={checkpoint},"
        "tokenizer_backend=huggingface,max_retries=1,tokenized_requests=True"
    )
    ours = evaluated(tasks, tmp_path / "ours", "local-completions", arguments)
    stock = evaluated(
        *(tasks, tmp_path / "stock", "hf", f"pretrained={checkpoint},dtype=float32"),
        *("--device", "cpu"),
    )
    assert ours["scores"] == stock["scores"]
    assert ours["scores"]["lab_choice acc,none"] > 0
    assert ours["generated"] == stock["generated"]
    for one, other in zip(ours["choice"], stock["choice"], strict=True):
        for (mine,), (theirs,) in zip(one, other, strict=True):
            assert float(mine[0]) == pytest.approx(float(theirs[0]), abs=2e-3)
            assert mine[1] == theirs[1]  # whether it is what the model would say


@needs("lm_eval")
def test_the_harness_talks_to_the_chat(server: Served, tasks: Path, tmp_path: Path) -> None:
    arguments = f"base_url={server.url}/v1/chat/completions,model=tiny,max_retries=1"
    options = ("--apply_chat_template",)
    found = evaluated(tasks, tmp_path / "chat", "local-chat-completions", arguments, *options)
    message = [{"role": "user", "content": QUESTIONS[0][0]}]
    said = chat(server.client(), messages=message, max_tokens=8, stop=["\n\n"])
    assert found["generated"][0] == [[said.choices[0].message.content]]


@needs("llama_benchy")
def test_llama_benchy_measures(server: Served, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("It was the best of times, and the worst of times. " * 200)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as books:
        threading.Thread(target=books.serve_forever, daemon=True).start()
        said = run(
            *("llama_benchy", "--base-url", f"{server.url}/v1", "--api-key", KEY),
            *("--model", "tiny", "--tokenizer", checkpoint, "--pp", 64, "--tg", 8, "--exact-tg"),
            *("--runs", 1, "--skip-coherence", "--no-cache", "--exit-on-first-fail"),
            *("--book-url", f"http://127.0.0.1:{books.server_port}/book.txt"),
            *("--format", "json", "--save-result", tmp_path / "result.json"),
            HOME=str(tmp_path),
        )
        books.shutdown()
    assert "pp64" in said or (tmp_path / "result.json").read_text().strip()


@needs("guidellm")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm_measures(server: Served, checkpoint: Path, tmp_path: Path, path: str) -> None:
    backend = f"kind=openai_http,target={server.url},model=tiny,request_format={path},api_key={KEY}"
    run(
        *("guidellm", "run", "--backend", backend, "--profile", "kind=synchronous"),
        *("--constraint", "kind=max_requests,count=3", "--disable-progress"),
        *("--tokenizer", f"kind=huggingface_auto,model={checkpoint}"),
        *("--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8"),
        *("--output", f"kind=json,path={tmp_path / 'report.json'}"),
    )
    report = json.loads((tmp_path / "report.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (3, 0)
    done = report["benchmarks"][0]["requests"]["successful"]
    assert [each["output_tokens"] for each in done] == [8, 8, 8]


@needs("schemathesis")
def test_no_request_costs_more_than_itself(server: Served, tmp_path: Path) -> None:
    """Thousands of requests with fields that are wrong, huge or missing: each is answered as the
    description says, and so is the next one."""
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,"
    checks += "response_schema_conformance,negative_data_rejection,unsupported_method"
    said = subprocess.run(
        [
            *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
            *("run", f"{server.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}", "--checks", checks),
            *("--max-examples", "20", "--request-timeout", "60", "--seed", "1", "--no-color"),
            *("--generation-database", "none"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=tmp_path,
    )
    assert said.returncode == 0, said.stdout[-20000:] + said.stderr[-1000:]
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert chat(server.client(), max_tokens=3).usage.completion_tokens == 3
    metrics = httpx.get(f"{server.url}/metrics", headers=bearer()).text
    assert 'status="500"' not in metrics
    assert "Traceback" not in server.said


@pytest.mark.parametrize("after", [1, 5])
def test_clients_that_go_away_in_mid_stream_cost_nobody_else(server: Served, after: int) -> None:
    alone = chat(server.client(), max_tokens=12).choices[0].message.content
    for _ in range(4):
        stream: openai.Stream[Any] = chat(
            server.client(), max_tokens=60, stream=True, n=2, temperature=1.0
        )
        for _, _ in zip(range(after), stream, strict=False):
            pass
        stream.close()
    server.wait_for("moerun_busy", 0)
    assert chat(server.client(), max_tokens=12).choices[0].message.content == alone
