"""What is told of a policy is what its class says: the table, one policy, the page in docs."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from moepolicy import find_policy
from moepolicy.catalogue import built_in, catalogue_table, description, entry_of, markdown
from moepolicy.library import BUILT_IN, FAMILIES
from support.commands import error_line

ROOT = Path(__file__).parents[2]
OWN = """
from moepolicy import Policy

class Mine(Policy):
    '''Evicts the lowest key, by 2401.00001 and 2512.12345v2, not by 2399.00001.

    The second paragraph.

        an item that goes
            on here
    '''

    requires = frozenset({"weights"})

    def __init__(self, context, least, share=0.5):
        pass

    def victim(self, layer, incoming, candidates):
        return int(candidates[0])

    def on_hit(self, key, now):
        pass

class Bare(Policy):
    def victim(self, layer, incoming, candidates):
        return int(candidates[0])
"""


def moesim(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from moesim.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "policies", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_page_in_docs_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    assert page == markdown(built_in()), "run: moesim policies --markdown > docs/policies.md"
    assert moesim("--markdown").stdout == page


def test_every_policy_has_its_family_its_hooks_and_its_needs() -> None:
    entries = {entry.name: entry for entry in built_in()}
    assert list(entries) == list(BUILT_IN)
    folders = {family.__name__.rpartition(".")[2]: family.POLICIES for family in FAMILIES}
    for name, entry in entries.items():
        assert name in folders[entry.family]
        assert "victim" in entry.hooks
        assert entry.summary.endswith(".")
    lru, spec, hobbit = entries["lru"], entries["lru-spec"], entries["hobbit-spec"]
    assert (lru.hooks, lru.decides, lru.papers) == (
        ("on_hit", "on_load", "victim"),
        (),
        ("2312.17238",),
    )
    # Made of parts: the hooks are those of the parts, not those of the class that asks them.
    assert spec.decides == ("prefetch",)
    assert "retain" not in spec.hooks
    assert hobbit.decides == ("prefetch", "on_miss", "precision")
    assert (hobbit.lossy, lru.lossy) == (True, False)
    assert hobbit.needs == ("low", "predictions", "weights")
    assert entries["foresight-spec"].welcomes == ("speed",)
    told = " ".join(description(entries["foresight-spec"]).split())
    assert "welcomes speed (the time of an expert's copy" in told
    assert entries["lfu-aging"].parameters == {"aging": "1"}


def test_a_policy_of_one_s_own_is_described(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    mine = entry_of(find_policy(f"{path}:Mine:least=2"))
    assert mine.papers == ("2401.00001", "2512.12345")
    assert (mine.family, mine.welcomes) == ("own", ())
    assert "welcomes" not in description(mine)
    assert mine.hooks == ("on_hit", "victim")
    assert mine.parameters == {"least": None, "share": "0.5"}
    told = description(mine, {"more": "is said"})
    assert "Evicts the lowest key" in told
    assert "\n    an item that goes on here\n" in told
    assert "parameters  least=..., share=0.5\n" in told
    assert "more        is said\n" in told
    bare = entry_of(find_policy(f"{path}:Bare"))
    assert (bare.rule, bare.papers) == ("", ())
    assert "no docstring" in description(bare)
    assert f"\n{path}:Bare" in catalogue_table([mine, bare])


@pytest.mark.slow
def test_the_command_prints_a_table_json_or_csv_and_one_policy() -> None:
    rows = json.loads(moesim("--format", "json").stdout)
    assert {row["policy"] for row in rows} >= set(BUILT_IN)
    flat = list(csv.DictReader(io.StringIO(moesim("hobbit", "--format", "csv").stdout)))
    assert [(row["policy"], row["needs"], row["lossy"]) for row in flat] == [
        ("hobbit", "low weights", "True")
    ]
    told = moesim("lru-spec").stdout
    assert told.startswith("lru-spec\n")
    assert "https://arxiv.org/abs/2312.17238" in told
    assert "did you mean 'lru-spec'" in error_line(moesim("lru-spek"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("other", ["lru", "--format=json"])
def test_the_page_is_of_all_and_of_one_form(other: str) -> None:
    assert "--markdown takes no policy" in error_line(moesim("--markdown", other), 2)
