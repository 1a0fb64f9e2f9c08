#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes and without a network: the tests of
# tests/gpu, then the benchmarks at Mixtral-8x7B's true size. Results go to the folder given (by
# default benchmarks/results/gpu): one JSON a benchmark, logs, and summary.json with what ran.
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# Needs torch with CUDA, transformers, numba, typer and rich; neither an installation of this
# project nor polars, hqq or simpy (tests that need those then fail and say so). PYTHON names the
# interpreter, TOKENS and ROUNDS the length of the benches, SHAPE and DEVICE what runs where,
# KERNELS options for the timing of kernels.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results/gpu}"
python="${PYTHON:-python3}"
device="${DEVICE:-cuda}"
shape="${SHAPE:-mixtral-8x7b}"
tokens="${TOKENS:-32}"
rounds="${ROUNDS:-3}"
routing="${ROUTING:-mixtral-like}"
kernels="${KERNELS:-}"
layers="${LAYERS:-8}" # of the comparison with accelerate, which brings every expert of each
mkdir -p "$out"
out="$(cd "$out" && pwd)"
root="$PWD"
export PYTHONPATH="$root/traces:$root/policies:$root/simulator:$root/runtime:$root/tracer"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
started=$SECONDS
steps=()

# step NAME SECONDS COMMAND...: run it within its time, keep its log, note how it ended.
step() {
  local name="$1" limit="$2" began=$SECONDS code=0
  shift 2
  echo "== $name (at most $limit s)" >&2
  timeout --kill-after=10 "$limit" "$@" >"$out/$name.out" 2>"$out/$name.log" || code=$?
  [ "$code" -eq 0 ] || tail -n 5 "$out/$name.log" >&2
  tail -n 25 "$out/$name.out"
  steps+=("{\"step\": \"$name\", \"exit\": $code, \"seconds\": $((SECONDS - began))}")
}

bench() {
  "$python" -c 'from moerun.cli import main; main()' bench "$@"
}
export -f bench
export python

step machine 30 "$python" - <<'PY'
import importlib.util, json, platform, torch
names = ("transformers", "numba", "triton", "typer", "rich", "accelerate", "pytest", "polars", "hqq", "simpy")
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "gpus": gpus,
                  "missing": [n for n in names if importlib.util.find_spec(n) is None]}))
PY
step tests 150 "$python" -m pytest -q -m gpu tests/gpu
# shellcheck disable=SC2086
step kernels 60 "$python" benchmarks/fused_gpu.py --device "$device" $kernels \
  --out "$out/fused_gpu.json"
for precision in 2bit 4bit; do
  step "bench-$precision" 140 bash -c 'bench "$@" >"$0"' "$out/bench-$precision.json" \
    --shape "$shape" --precision "$precision" --routing "$routing" --slots 4 --streams 2 \
    --policy lru --policy lru-spec --baseline released \
    --tokens "$tokens" --warm-up 12 --rounds "$rounds" --device "$device" --format json
done
step accelerate 100 "$python" benchmarks/offload_gpu.py --shape "$shape" --layers "$layers" \
  --routing "$routing" --rounds "$rounds" --device "$device" --out "$out/offload_gpu.json"
step bookkeeping 90 "$python" benchmarks/bookkeeping.py --rounds 2 --out "$out/bookkeeping.json"

joined="$(IFS=,; echo "${steps[*]}")"
printf '{"seconds": %d, "steps": [%s]}\n' "$((SECONDS - started))" "$joined" | tee "$out/summary.json"
[[ "$joined" != *'"exit": '[1-9]* ]]
