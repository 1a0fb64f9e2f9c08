"""A process that has imported everything, and forks a child for each job of a campaign.

It reads one job a line on stdin, ``CASE NUMBER``, and answers with one line of JSON.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

KINDS = {"files": "stress.files:WrongFiles", "policies": "stress.policies:BadPolicies"}


def main() -> None:
    """Obey until stdin ends: the kind of jobs, a folder of the worker's own, and the seed."""
    module, _, name = KINDS[sys.argv[1]].partition(":")
    root, seed = Path(sys.argv[2]).resolve(), int(sys.argv[3])
    root.mkdir(parents=True, exist_ok=True)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    work = getattr(importlib.import_module(module), name)(root, seed)
    for line in sys.stdin:
        case, _, number = line.rstrip("\n").rpartition(" ")
        answers.write(json.dumps(asdict(work(case, int(number)))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
