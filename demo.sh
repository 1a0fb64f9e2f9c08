#!/usr/bin/env bash
# The whole way once: record real routing, compare policies on it, run the best of them live.
# `make demo` calls this with the commands on the PATH; what it makes lands in demo/.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p demo

# The bundled model is so small that sharing its work among threads costs more than it brings.
export OMP_NUM_THREADS=1

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
# The command as it can be typed again: what has blanks in quotes.
shown() { for word in "$@"; do case $word in *' '*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac; done; }
run() { printf '$%s\n' "$(shown "$@")"; "$@"; }

# Text that any Python carries: the language reference as pydoc shows it, and library sources.
library=$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
corpus=("$library/pydoc_data/topics.py" "$library/argparse.py" "$library/statistics.py")

say '1. Record which experts the bundled model chooses for text of the Python library'
run moetrace record "${corpus[@]}" --model tiny --tokens 8192 --horizon 3 --out demo/python.parquet --force
run moetrace stats demo/python.parquet

say '2. Simulate policies on that trace: whose choice of experts costs the fewest copies?'
run moesim compare lru lfu fifo random static lru-spec belady --trace demo/python.parquet --slots 2,4,6 --machine cpu-disk

say '3. Generate text with half of the experts in memory, under the base paper'"'"'s policy'
run moerun generate --policy lru-spec --slots 4 --link-gbps 0.5 --max-new-tokens 120 --prompt 'The house was quiet, and the prince said to her'

say '4. Predicted against live: the same policies simulated and run, on a link of 0.5 GB/s'
echo '   Each turn measures this machine and runs each policy once. On a busy machine turns take longer,'
echo '   and after half a minute no more of them begin: more turns, without other programs, agree better.'
run moerun fidelity lru lfu lru-spec --slots 4 --link-gbps 0.5 --seconds 30

took=$SECONDS
printf '\nThe demo took %d s. Its trace is demo/python.parquet: moesim report demo/python.parquet --out demo/report.html\n' "$took"
