"""Wrong files that carry code, or unpack to more than they are."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import struct
from typing import Any

import numpy as np

PWNED = "pwned"
EVIL = "evil.py"
EVIL_CODE = f"""import os

os.makedirs({PWNED!r}, exist_ok=True)


class Evil:
    pass
"""
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('pwned') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{% for a in range(99999999) %}x{% endfor %}",
    "{% include 'evil.py' %}",
    "{{ raise_exception('x') }}",
    "{{ messages[7].content }}",
    "{% if %}",
)


class Payload:
    """Makes the folder PWNED where it is unpickled; nothing may ever do that."""

    def __reduce__(self) -> Any:
        return os.mkdir, (PWNED,)


def pickled(data: bytes, rng: random.Random) -> bytes:
    """Files of the formats that can carry code, with code in them."""
    import torch

    file = io.BytesIO()
    kind = rng.randrange(3)
    if kind == 0:
        torch.save({"records": Payload(), "x": data[:1]}, file)
    elif kind == 1:
        file.write(pickle.dumps(Payload()))
    else:
        np.save(file, np.array([Payload()], dtype=object), allow_pickle=True)
    return file.getvalue()


def names_code(data: bytes, rng: random.Random) -> bytes:
    """A JSON object of transformers that names classes of EVIL, which lies in its folder."""
    value = json.loads(data)
    evil = f"{EVIL.removesuffix('.py')}.Evil"
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer")
    value["auto_map"] = {name: rng.choice((evil, [evil, evil], f".--{evil}")) for name in classes}
    value["trust_remote_code"] = True
    if rng.random() < 0.5:
        value["model_type"] = rng.choice(("evil", EVIL, ""))
    if rng.random() < 0.5:
        value["tokenizer_class"] = rng.choice(("Evil", "EvilFast", evil, "os.system"))
    if rng.random() < 0.5:
        value["chat_template"] = rng.choice(TEMPLATES)
    if rng.random() < 0.3:
        value["custom_generate"] = "."
    return json.dumps(value).encode()


def template(data: bytes, rng: random.Random) -> bytes:
    """A chat template that reaches for what is not its own, or ends nowhere."""
    text = rng.choice(TEMPLATES).encode()
    return text if rng.random() < 0.5 else data + text


def repacked(data: bytes, rng: random.Random) -> bytes:
    """A gzip file of changed contents, or one that unpacks to a thousand times its size."""
    from stress.mutations import BYTES, json_lines

    if rng.random() < 0.1:
        return gzip.compress(bytes(rng.choice((1 << 20, 300 << 20))), 1)
    inner = rng.choice((json_lines, *BYTES))(gzip.decompress(data), rng)
    packed = gzip.compress(inner)
    return packed + rng.choice((b"", b"", packed, struct.pack("<Q", 1 << 60)))
