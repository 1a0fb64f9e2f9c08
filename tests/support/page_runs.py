"""How every command of README.md and of docs/ is run by tests/end_to_end/test_pages.py.

A command that a page gains needs a line here. The commands of docs/writing-a-policy.md are in
tests/end_to_end/test_guide.py.
"""

from __future__ import annotations

from typing import NamedTuple


class Run(NamedTuple):
    """How a command of a page is run, and what it must leave or print."""

    given: tuple[str, ...] = ()  # files of the kit that lie in the folder
    leaves: str | None = None  # a file that is there afterwards
    prints: str | None = None
    shows: bool = False  # prints every row of the table that the page shows after it
    draws: str | None = None  # the picture of the repository that ``leaves`` is
    stdin: str = ""
    slow: bool = False
    # What runs in its place, where the command downloads or takes hours: the same form, small.
    instead: str | None = None
    downloads: bool = False  # the page says so, in a comment after the command
    by: str | None = None  # the test that runs it: "tests/FILE.py::test_name"
    options: bool = False  # needs what is not here: its help has all its options


SERVED = "tests/end_to_end/test_pages.py::test_the_server_answers"
CAMPAIGNS = "tests/stress/test_campaigns.py::"
RUNS: dict[str, Run] = {
    "moesim compare lru lfu lru-spec foresight-bypass foresight-spec --machine t4 --slots 4 "
    "--expert-bytes 93671424 --dense-layer-bytes 22384640 --dense-token-bytes 262160384": Run(
        prints="foresight-spec is the fastest policy that runs live", slow=True
    ),
    "moetrace record CORPUS --model M --out T.parquet": Run(("text.txt",), "t.parquet"),
    "moesim compare lru lfu belady --trace T.parquet": Run(("t.parquet",), prints="belady"),
    'moerun --policy lru-spec --model M --prompt "..."': Run(),
    "make demo": Run(),
    "make test": Run(),
    "moetrace record text.txt folder/ lines.jsonl --field text --model tiny --out t.parquet": Run(
        ("text.txt", "folder", "lines.jsonl"), "t.parquet"
    ),
    "moetrace import recording.json --out t.parquet": Run(("recording.json",), "t.parquet"),
    "moetrace export t.parquet --to counts --out counts.json": Run(("t.parquet",), "counts.json"),
    "moetrace stats t.parquet": Run(("t.parquet",), prints="locality"),
    "moesim compare lru lfu belady": Run(prints="belady"),
    "moesim recommend qwen3-30b-a3b --machine rtx4070 --memory 10GiB --config run.toml": Run(
        leaves="run.toml", prints="moerun generate", slow=True
    ),
    'moerun --config run.toml --prompt "..."': Run(("run.toml",)),
    "moerun fidelity --config run.toml --rounds 1": Run(
        ("run.toml",), prints="sim tok/s", slow=True
    ),
    "moesim report t.parquet --out report.html": Run(("t.parquet",), "report.html", slow=True),
    "moesim compare lru lfu belady --slots 3,4,6 --plot c.svg": Run(leaves="c.svg"),
    "moesim machines --expert-bytes 94371840 --dense-layer-bytes 22384640": Run(
        prints="copy / layer"
    ),
    "moesim compare lru lru-spec:n=1 my_policy.py:Mine --trace mixtral-like --slots 2,4,6 "
    "--precision 2bit --machine t4": Run(("my_policy.py",), prints="my_policy.py:Mine", slow=True),
    "moesim compare lru lfu --trace mixtral-like --precision 2bit --slots 4 --cold": Run(
        prints="cold at every sequence", slow=True
    ),
    "moesim compare lru lru-spec --machine t4 --tokens 50 --slots 4 --timeline out.json.gz": Run(
        leaves="out.json.gz"
    ),
    "moesim machines": Run(prints="rtx3060"),
    "moerun generate --plan --model mixtral-8x7b --precision 2bit --memory 12GiB": Run(
        prints="of 8 experts in each of 32 layers"
    ),
    "moerun generate --plan --model gpt-oss-20b --memory 12GiB --context 4096"
    " --prompt-chunk 512 --device cuda": Run(prints="of 32 experts in each of 24 layers"),
    "moerun --plan --model mixtral-8x7b --precision 2bit --memory 12GiB --device cuda": Run(
        prints="cuda:0"
    ),
    "moerun families": Run(prints="qwen3_moe"),
    "moesim policies": Run(prints="lru-spec"),
    "moesim compare lru lru-spec --trace mixtral-like --precision 2bit --slots 4": Run(
        prints="lru-spec", slow=True
    ),
    "python -m moeroute.synthetic --tokens 2048 --seed 0 --out mixtral-like.parquet": Run(
        leaves="mixtral-like.parquet", prints="published", slow=True
    ),
    "moesim compare lru lfu belady lru-spec clairvoyant --trace mixtral-like --precision 2bit "
    "--slots 4 --tokens 300": Run(prints="clairvoyant", shows=True, slow=True),
    "moesim curve lru lfu belady": Run(prints="shuffled"),
    "moesim sweep lru lru-spec --slots 2,4,6 --machine t4,rtx3060 --out sweep.parquet": Run(
        leaves="sweep.parquet", prints="best policy", slow=True
    ),
    "moesim table2": Run(prints="Left unexplained", shows=True, slow=True),
    'moerun generate --policy lru-spec --slots 4 --prompt "The house was quiet, and"': Run(),
    'moerun generate --policy foresight-bypass --learned learned.safetensors --prompt "..."': Run(
        leaves="learned.safetensors", slow=True
    ),
    "moerun pack CHECKPOINT --precision 2bit --out store/": Run(leaves="store/index.json"),
    "moerun generate --model store/ --policy lru-spec --memory 9GiB --prompt-file prompt.txt": Run(
        ("store", "prompt.txt")
    ),
    'moerun generate --link-gbps 0.5 --policy lru --record live.parquet --prompt "..."': Run(
        leaves="live.parquet", slow=True
    ),
    "moerun profile --out this-machine.toml": Run(leaves="this-machine.toml", slow=True),
    # On a busy machine turns are made again, for minutes.
    "moerun fidelity lru lfu lru-spec --slots 4 --link-gbps 0.5": Run(
        prints="live tok/s",
        slow=True,
        instead="moerun fidelity lru lfu lru-spec --slots 4 --link-gbps 0.5 --seconds 20",
    ),
    'moerun generate --policy hobbit --low 2bit --slots 3 --prompt "..."': Run(slow=True),
    'moerun generate --memory 60MiB --max-new-tokens 20 --plan --prompt "Once upon a time"': Run(
        prints="KV cache"
    ),
    "moerun pack CHECKPOINT --precision 2bit --attention 4bit --out store/": Run(
        leaves="store/attention.safetensors", slow=True
    ),
    "moerun perplexity TEXT --model M --attention native,4bit --experts 4bit,3bit,2bit": Run(
        ("text.txt",), prints="bits/byte", slow=True
    ),
    "moerun perplexity --attention native --experts native --policy lru --policy hobbit "
    "--low 2bit --slots 3 --tokens 1000": Run(prints="hobbit", slow=True),
    "moerun bench --shape mixtral-8x7b --layers 4 --policy lru --policy lru-spec --baseline "
    "released --tokens 16 --warm-up 4 --rounds 1": Run(prints="released", slow=True),
    "moerun chat --policy lru-spec --slots 4": Run(stdin="Hello\n", slow=True),
    "moerun serve --policy lru-spec --slots 4 --port 8000": Run(by=SERVED),
    "curl -s http://127.0.0.1:8000/v1/chat/completions -d "
    """'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}'""": Run(by=SERVED),
    "curl -s http://127.0.0.1:8000/metrics": Run(by=SERVED),
    "moesim check mine.py:Mine --only rules,repeats,memory": Run(("mine.py",), prints="ok memory"),
    "moesim compare lru mine.py:Mine mine.py:Mine:half_life=200": Run(
        ("mine.py",), prints="mine.py:Mine:half_life=200"
    ),
    'moerun generate --policy mine.py:Mine --prompt "..."': Run(("mine.py",)),
    "moesim compare lru hobbit adapmoe-skip --trace mixtral-like --precision 4bit "
    "--low 2bit --slots 3": Run(prints="* changes what the model computes", slow=True),
    'moerun generate --policy fiddler --slots 3 --prompt "..."': Run(slow=True),
    'moesim compare lru "lru+gate(n=1)" "lfu+adapmoe-skip.misses" '
    '"adaptive(lru-spec,lru,when=late>0.2,window=64)"': Run(prints="lfu+adapmoe-skip.misses"),
    "moesim fit promoe --out promoe.safetensors": Run((), "promoe.safetensors"),
    "moesim compare lru promoe:params=promoe.safetensors --held-out --slots 4": Run(
        ("promoe.safetensors",), prints="promoe:params=promoe.safetensors"
    ),
    # benchmarks.md
    "make mutants MODULE=policies/moepolicy/machine.py TESTS=tests/policies": Run(),
    "make bench": Run(),
    # sweeping.md
    "moesim sweep lru lfu lru-spec belady --param lru-spec:n=1,2 --slots 2,4,6 --machine t4,a100 "
    "--out r.parquet": Run(leaves="r.parquet", prints="best policy", slow=True),
    "moesim sweep --grid grid.toml --out r.parquet --resume": Run(
        ("grid.toml",), "r.parquet", slow=True
    ),
    "moesim sweep --grid grid.toml --trace s3://bucket/trace.parquet --out s3://bucket/r.parquet "
    "--on ray://head:10001": Run(
        by="tests/simulator/sweep/test_sweep.py::test_traces_and_results_in_an_object_store"
    ),
    # what made the tables of research.md, results.md and reliability.md
    "python benchmarks/research.py wikitext=wiki.parquet prose=prose.parquet code=code.parquet "
    "gpt-oss-20b=gpt-oss-20b.parquet gemma-4-26b=gemma.parquet qwen3-30b=qwen.parquet "
    "--out research --tables hits": Run(options=True),
    "python benchmarks/research.py prose=prose.parquet code=code.parquet "
    "gpt-oss-20b=gpt-oss-20b.parquet gemma-4-26b=gemma.parquet --out research "
    "--tables time": Run(options=True),
    "python benchmarks/research.py prose=prose.parquet code=code.parquet "
    "gpt-oss-20b=gpt-oss-20b.parquet gemma-4-26b=gemma.parquet --out research "
    "--tables shared": Run(options=True),
    "python benchmarks/research.py prose=prose.parquet code=code.parquet --out research "
    "--tables thresholds": Run(options=True),
    "python benchmarks/research.py prose=prose.parquet code=code.parquet "
    "gpt-oss-20b=gpt-oss-20b.parquet --out research --tables ablations": Run(options=True),
    "python benchmarks/research_tries.py wikitext=wiki.parquet code=code.parquet "
    "gpt-oss-20b=gpt-oss-20b.parquet qwen3-30b=qwen3-30b.parquet --out tries.md": Run(options=True),
    "python benchmarks/research_live.py --gbps 0.2 --gbps 0.5 --gbps 2 --out live.md": Run(
        options=True
    ),
    "moerun bench --shape mixtral-8x7b --layers 4 --precision 4bit --routing tiny --store STORE "
    "--direct --slots 4 --policy lru --policy lru-spec --policy class-lru --policy "
    "foresight-bypass --policy foresight-spec --tokens 24 --warm-up 8 --rounds 3": Run(
        instead="moerun bench --shape tiny --layers 2 --precision 4bit --routing tiny "
        "--store bench --direct --slots 4 --policy lru --policy foresight-bypass --tokens 2 "
        "--warm-up 1 --rounds 1"
    ),
    "python benchmarks/research_live.py --gbps 0.2 --slots 6 --out live.md": Run(options=True),
    "moerun bench --shape qwen3-30b-a3b --top-k 6 --layers 4 --precision 4bit --routing "
    "qwen3-30b.parquet --store STORE --direct --slots 32 --policy lru --policy class-lru --policy "
    "foresight-bypass --policy foresight-ahead --tokens 64 --warm-up 24 --rounds 3": Run(
        instead="moerun bench --shape tiny --layers 2 --top-k 1 --precision 4bit --routing uniform "
        "--store bench1 --direct --slots 4 --policy lru --policy foresight-ahead --tokens 2 "
        "--warm-up 1 --rounds 1"
    ),
    "python benchmarks/policy_results.py tiny mixtral-like prose.trace.parquet code.trace.parquet "
    "> docs/results.md": Run(options=True),
    "moetrace record README.md docs --tokens 16384 --out prose.trace.parquet": Run(
        ("text.txt", "folder"),
        "prose.trace.parquet",
        instead="moetrace record text.txt folder --out prose.trace.parquet",
    ),
    "moetrace record policies/moepolicy/*.py --tokens 16384 --out code.trace.parquet": Run(
        ("mine.py",),
        "code.trace.parquet",
        instead="moetrace record mine.py --out code.trace.parquet",
    ),
    "python -m stress files --out /tmp/files --count 10000 --minutes 60": Run(
        by=f"{CAMPAIGNS}test_wrong_files_are_read_or_refused_in_one_line"
    ),
    "python -m stress kills --out /tmp/kills --count 1000 --minutes 60": Run(
        by=f"{CAMPAIGNS}test_killed_works_end_with_the_bytes_of_an_undisturbed_run"
    ),
    "python -m stress plans --out /tmp/plans --count 1000 --minutes 60": Run(
        by=f"{CAMPAIGNS}test_a_plan_s_peak_is_within_its_budget"
    ),
    "python -m stress policies --out /tmp/policies --count 5000": Run(
        by=f"{CAMPAIGNS}test_bad_policies_are_named_and_change_nothing"
    ),
    "python -m stress long --out /tmp/long --minutes 60": Run(
        by=f"{CAMPAIGNS}test_long_runs_count_alike_and_stay_small"
    ),
    "python -m stress fuzz --out /tmp/fuzz --minutes 10": Run(
        prints="--minutes", instead="python -m stress fuzz --help"
    ),
    "python -m stress faults --out /tmp/faults --minutes 600": Run(
        by=f"{CAMPAIGNS}test_calls_that_fail_are_refused_in_one_line_or_borne"
    ),
    "python -m stress powercuts --out /tmp/cuts --count 500 --minutes 60": Run(
        by=f"{CAMPAIGNS}test_power_cuts_leave_what_was_there_or_all_that_is_new"
    ),
    "python -m stress limits --out /tmp/limits --count 500 --minutes 60": Run(
        by=f"{CAMPAIGNS}test_a_limit_of_memory_is_told_in_one_line"
    ),
    "python -m stress server --out /tmp/server --count 1000 --minutes 60": Run(
        by=f"{CAMPAIGNS}test_a_server_under_load_loses_no_request"
    ),
    "python -m stress schedules --out /tmp/schedules --count 10000": Run(
        by=f"{CAMPAIGNS}test_random_schedules_compute_from_the_right_records"
    ),
    "python -m stress pairs --out /tmp/pairs --count 200": Run(
        by=f"{CAMPAIGNS}test_two_processes_on_one_output_do_not_mix"
    ),
    # installing.md
    "python -m venv .venv": Run(prints="usage: venv", instead="python -m venv --help"),
    "uv venv": Run(options=True),
    "uv pip install -c constraints.txt -e '.[run,serve,plots]'": Run(options=True),
    "pip install --require-hashes -r requirements.lock": Run(options=True),
    # beside-llama-cpp.md
    "python -m venv LLAMA && LLAMA/bin/pip install llama-cpp-python==0.3.36": Run(
        prints="usage: venv", instead="python -m venv --help"
    ),
    "python benchmarks/llama_cpp.py --folder SCRATCH --llama-python LLAMA/bin/python": Run(
        options=True
    ),
    "python benchmarks/llama_cpp_tries.py SCRATCH/qwen3-30b-a3b/store": Run(options=True),
    "moesim policies --markdown": Run(prints="do not edit"),
    # traces.md and gguf.md
    "moetrace import run.npz --out t.parquet": Run(("run.npz",), "t.parquet"),
    "moetrace import FILE --out TRACE.parquet": Run(("recording.json",), "trace.parquet"),
    "moetrace import --formats": Run(prints="sglang"),
    "moetrace import answers.json --out t.parquet --top-k 8": Run(
        ("answers.json",),
        "t.parquet",
        instead="moetrace import answers.json --out t.parquet --top-k 2",
    ),
    "moetrace export T --to counts --out c.json": Run(("t.parquet",), "c.json"),
    "moetrace export T --to jsonl --out t.jsonl": Run(("t.parquet",), "t.jsonl"),
    "moetrace export T --to npz --out t.npz": Run(("t.parquet",), "t.npz"),
    "moetrace export T --to placement --slots 4 --out p.json": Run(("t.parquet",), "p.json"),
    "moerun pack MODEL.gguf --out store/": Run(("tiny.gguf",), "store/index.json"),
    "moerun --plan --model MODEL.gguf --memory 12GiB": Run(("tiny.gguf",), prints="slots"),
    "moerun generate --model MODEL.gguf --record OUT.parquet": Run(
        ("tiny.gguf",),
        "out.parquet",
        instead='moerun generate --model MODEL.gguf --record OUT.parquet --prompt "Once"',
        slow=True,
    ),
    # README.md's picture
    "moesim compare lru lfu lru-spec foresight-spec belady --machine t4 --slots 2,3,4,5 "
    "--expert-bytes 93671424 --dense-layer-bytes 22384640 --dense-token-bytes 262160384 "
    "--plot t4.svg": Run(leaves="t4.svg", shows=True, draws="docs/pictures/t4.svg", slow=True),
    # guides/mixtral-12gb.md
    "moesim recommend mixtral-8x7b --machine rtx3060 --memory 11GiB --least-bits 3 "
    "--attention 4bit --config mixtral.toml": Run(
        leaves="mixtral.toml", prints="--precision 3bit --attention 4bit", slow=True
    ),
    "moerun --plan --model mixtral-8x7b --precision 3bit --attention 4bit --memory 11GiB "
    "--context 4096 --device cuda": Run(shows=True),
    "moerun bench --shape mixtral-8x7b --layers 2 --precision 3bit --attention 4bit --policy lru "
    "--policy class-lru --tokens 16 --warm-up 4 --rounds 1": Run(
        prints="class-lru",
        slow=True,
        instead="moerun bench --shape mixtral-8x7b --layers 1 --precision 3bit --attention 4bit "
        "--policy lru --policy class-lru --tokens 4 --warm-up 1 --rounds 1",
    ),
    "moerun pack mistralai/Mixtral-8x7B-Instruct-v0.1 --precision 3bit --attention 4bit "
    "--out mixtral/": Run(leaves="mixtral/index.json", downloads=True),
    'moerun generate --config mixtral.toml --model mixtral/ --prompt "The house was quiet, and"': (
        Run(("mixtral", "mixtral.toml"), slow=True)
    ),
    "moerun chat --config mixtral.toml --model mixtral/": Run(
        ("mixtral", "mixtral.toml"), stdin="Hello\n", slow=True
    ),
    # guides/gpt-oss.md
    "moerun --plan --model gpt-oss-20b --memory 11GiB --context 4096 --prompt-chunk 512 "
    "--device cuda": Run(shows=True),
    "moesim recommend gpt-oss-20b --machine rtx3060 --memory 11GiB": Run(
        prints="--model openai/gpt-oss-20b", slow=True
    ),
    "moerun pack openai/gpt-oss-20b --out gpt-oss/": Run(
        ("gpt-oss-published",), "gpt-oss/index.json", downloads=True
    ),
    "moerun chat --model gpt-oss/ --policy foresight-spec --memory 11GiB --context 4096 "
    "--prompt-chunk 512": Run(("gpt-oss",), stdin="Hello\n", slow=True),
    "moerun serve --model gpt-oss/ --policy foresight-spec --memory 11GiB --context 4096 "
    "--prompt-chunk 512 --port 8000": Run(("gpt-oss",), by=SERVED),
    # guides/qwen36.md
    "moesim recommend qwen3.6-35b-a3b --machine rtx4070 --memory 10GiB --config qwen.toml": Run(
        leaves="qwen.toml", prints="--model Qwen/Qwen3.6-35B-A3B --precision 4bit", slow=True
    ),
    "moerun --plan --model qwen3.6-35b-a3b --precision 4bit --memory 10GiB --context 4096 "
    "--device cuda": Run(shows=True),
    "moerun pack Qwen/Qwen3.6-35B-A3B --precision 4bit --out qwen36/": Run(
        ("qwen36-published",), "qwen36/index.json", downloads=True, slow=True
    ),
    "moerun chat --config qwen.toml --model qwen36/": Run(
        ("qwen36", "qwen.toml"), stdin="Hello\n", slow=True
    ),
    "moerun serve --config qwen.toml --model qwen36/ --port 8000": Run(
        ("qwen36", "qwen.toml"), by=SERVED
    ),
    # guides/record-your-model.md
    "moetrace record my-texts/ --model OWNER/NAME --tokens 20000 --out trace.parquet": Run(
        ("folder",), "trace.parquet", downloads=True, slow=True
    ),
    "moerun pack OWNER/NAME --precision 4bit --out store/": Run(
        leaves="store/index.json", downloads=True, slow=True
    ),
    "moerun generate --model store/ --policy lru --memory 10GiB --prompt-file prompt.txt "
    "--max-new-tokens 500 --record trace.parquet": Run(
        ("store", "prompt.txt"),
        "trace.parquet",
        instead="moerun generate --model store/ --policy lru --memory 10GiB --prompt-file "
        "prompt.txt --max-new-tokens 20 --record trace.parquet",
        slow=True,
    ),
    "moetrace stats trace.parquet": Run(("trace.parquet",), prints="recall"),
    "moesim compare lru lfu lru-spec foresight-spec belady --trace trace.parquet": Run(
        ("trace.parquet",), prints="foresight-spec", slow=True
    ),
    "moesim report trace.parquet --out report.html": Run(
        by="tests/end_to_end/test_pages.py::test_a_command_of_a_page"  # of t.parquet
    ),
    # guides/choose-a-policy.md
    "moesim compare lru lfu class-lru lru-spec foresight-spec belady --machine t4 --slots 4 "
    "--tokens 2048 --expert-bytes 93671424 --dense-layer-bytes 22384640 "
    "--dense-token-bytes 262160384": Run(
        prints="foresight-spec is the fastest policy that runs live", slow=True
    ),
    # guides/read-a-timeline.md
    "moesim compare lru lru-spec belady --machine cpu-disk --tokens 50 --slots 4 "
    "--timeline out.json.gz": Run(leaves="out.json.gz"),
    # guides/sweep-on-a-cluster.md
    "moesim sweep lru lru-spec lfu --slots 2,4,6 --machine t4,rtx3060 --out sweep.parquet "
    "--resume": Run(("sweep.parquet",), "sweep.parquet", prints="best policy", slow=True),
    "python -c \"import polars; print(polars.read_parquet('sweep.parquet').select('policy', "
    "'slots', 'machine', 'hit_ratio', 'tokens_per_s'))\"": Run(
        ("sweep.parquet",), prints="tokens_per_s", slow=True
    ),
    # guides/another-engines-trace.md
    "moetrace import qwen.json --like qwen3-30b-a3b --out t.parquet": Run(
        ("qwen.json",), "t.parquet"
    ),
    "moesim compare lru lfu belady --trace t.parquet": Run(("t.parquet",), prints="belady"),
    # gguf.md
    "moetrace record --model MODEL.gguf": Run(
        ("text.txt", "tiny.gguf"),
        "t.parquet",
        slow=True,
        instead="moetrace record text.txt --model MODEL.gguf --out t.parquet",
    ),
}
