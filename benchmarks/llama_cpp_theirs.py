"""llama.cpp as `llama_cpp.py` runs it: a process that loads a model, then answers a line a run.

It needs llama-cpp-python and NumPy alone, so it may run in an environment without torch.

    python -P llama_cpp_theirs.py '{"model": PATH, "threads": 2, ...}'
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from importlib import import_module
from typing import Any


def main() -> None:
    """Load at the first line on stdin; each further line runs prompt and tokens once."""
    sys.stdin.readline()
    case = json.loads(sys.argv[1])
    model = load(case)
    print(json.dumps({"system": system_info()}), flush=True)
    while sys.stdin.readline():
        print(json.dumps(run(model, case)), flush=True)


def bindings() -> Any:
    """llama.cpp's functions. Not imported by name: this folder has a script of the same name."""
    return import_module("llama_cpp.llama_cpp")


def load(case: dict[str, Any]) -> Any:
    c = bindings()
    defaults = c.llama_model_default_params

    def parameters() -> Any:
        chosen = defaults()
        chosen.use_extra_bufts = case["repack"]
        return chosen

    c.llama_model_default_params = parameters
    return import_module("llama_cpp").Llama(
        case["model"],
        n_ctx=case["context"],
        n_batch=512,
        n_threads=case["threads"],
        n_threads_batch=case["threads"],
        use_mmap=case["mmap"],
        flash_attn=case["flash"],
        verbose=False,
    )


def run(model: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the prompt and of each token after it, and the logits at each place."""
    c = bindings()
    model.reset()
    c.llama_memory_clear(c.llama_get_memory(model.ctx), True)
    prompt, tokens = case["prompt"], case["tokens"]
    began_s, cpu_s = time.perf_counter(), [time.process_time()]
    model.eval(prompt)
    best = [likeliest(model)]
    prompt_s = time.perf_counter() - began_s
    cpu_s.append(time.process_time())
    token_s = []
    for token in tokens:
        began_s = time.perf_counter()
        model.eval([token])
        best.append(likeliest(model))
        token_s.append(time.perf_counter() - began_s)
    cpu_s.append(time.process_time())
    return {
        "prompt_s": prompt_s,
        "token_s": token_s,
        "cpu_s": [cpu_s[1] - cpu_s[0], cpu_s[2] - cpu_s[1]],
        "best": best,
        "logits": logits(model),
    }


def _row(model: Any) -> Any:
    import numpy as np

    c = bindings()
    pointer = c.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(pointer, shape=(model.n_vocab(),))


def likeliest(model: Any) -> int:
    """The likeliest next token, which a greedy reader would take."""
    return int(_row(model).argmax())


def logits(model: Any) -> list[float]:
    """Some of the last place's logits, to hold beside those of the other engine."""
    return [round(float(value), 4) for value in _row(model)[:64]]


def system_info() -> str:
    c = bindings()
    c.llama_print_system_info.restype = ctypes.c_char_p
    return bytes(c.llama_print_system_info()).decode()


if __name__ == "__main__":
    main()
