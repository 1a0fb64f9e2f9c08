"""The colours can be told apart by everybody, on both pages, and belong to their policies."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from moesim.pictures.colours import OWN, POLICY_COLOURS, SHAPES, TONES, PolicyMarks, dark_of
from numpy.typing import NDArray

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


def linear(colour: str) -> NDArray[np.float64]:
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    found: NDArray[np.float64] = np.array(to_lab) @ np.cbrt(np.array(to_lms) @ np.clip(rgb, 0, 1))
    return found


def contrast(one: str, other: str) -> float:
    levels = sorted(float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (one, other))
    return (levels[1] + 0.05) / (levels[0] + 0.05)


@pytest.mark.parametrize("theme", TONES)
@pytest.mark.parametrize("vision", VISIONS)
def test_policies_differ_for_every_vision(theme: str, vision: str) -> None:
    seen = [oklab(VISIONS[vision] @ linear(colour)) for colour in POLICY_COLOURS[theme]]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 0.13


@pytest.mark.parametrize("theme", TONES)
def test_lines_and_words_stand_out_from_the_page(theme: str) -> None:
    tones = TONES[theme]
    assert all(contrast(colour, tones.page) >= 3 for colour in POLICY_COLOURS[theme])
    assert contrast(tones.line, tones.page) >= 3
    assert min(contrast(tones.ink, tones.page), contrast(tones.faint, tones.page)) >= 4.5
    levels = [float(linear(colour).sum()) for colour in tones.ramp]
    assert levels == sorted(levels, reverse=theme == "light")


def test_every_light_colour_has_its_dark_one() -> None:
    light = TONES["light"]
    assert {*POLICY_COLOURS["light"], *light.ramp, light.page, light.ink} <= set(dark_of())
    assert len(set(dark_of().values())) == len(dark_of())


def test_a_policy_keeps_its_colour_in_other_company() -> None:
    alone, together = PolicyMarks.of(["lru"]), PolicyMarks.of(["arc", "lru", "lfu", "limit"])
    assert alone.colour["lru"] == together.colour["lru"] == POLICY_COLOURS["light"][OWN["lru"]]
    assert len({*together.colour.values()}) == 4


def test_policies_of_one_colour_have_other_shapes() -> None:
    names = [f"p{i}" for i in range(len(POLICY_COLOURS["light"]) * len(SHAPES))]
    marks = PolicyMarks.of(names)
    looks = [(marks.colour[name], marks.shape[name]) for name in names]
    assert len(set(looks)) == len(names)
    assert len({marks.colour[name] for name in names[:7]}) == 7
