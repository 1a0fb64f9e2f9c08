"""Files that commands write: their format, what they may replace, and what fails while writing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import polars as pl
import pytest
from moepolicy.console import CommandError, CommandUsageError
from moepolicy.outputs import (
    Output,
    check_free,
    check_suffix,
    drop_tree,
    exchange,
    naming,
    remove_tree,
    written_whole,
)
from moepolicy.tables import Format

ROWS = [{"policy": "lru", "loads": 3, "gap": None}, {"policy": "lfu", "loads": 2, "gap": 0.5}]


@pytest.mark.parametrize("suffix", ["txt", "json", "csv", "parquet"])
def test_the_suffix_says_what_a_file_holds(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows.{suffix}"
    Output.checked(out, None, force=False).deliver(ROWS, lambda: "the table\n")
    assert list(tmp_path.iterdir()) == [out]
    if suffix == "txt":
        assert out.read_text() == "the table\n"
    elif suffix == "json":
        assert json.loads(out.read_text()) == ROWS
    elif suffix == "csv":
        assert out.read_text() == "policy,loads,gap\nlru,3,\nlfu,2,0.5\n"
    else:
        assert pl.read_parquet(out).to_dicts() == ROWS


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", ".json", "rows.json.bak"])
def test_an_unknown_suffix_is_refused_with_those_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(CommandUsageError, match=r"there are: \.txt, \.json, \.csv, \.parquet"):
        Output.checked(tmp_path / name, None, force=False)


def test_a_format_that_contradicts_the_suffix_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    with pytest.raises(CommandUsageError, match="would hold json, and --format says csv"):
        Output.checked(out, Format.csv, force=False)
    assert Output.checked(out, Format.json, force=False).format == "json"
    assert Output.checked(None, None, force=False).format == "table"


def test_the_longest_suffix_counts() -> None:
    assert check_suffix("a.json.gz", [".json", ".json.gz"]) == ".json.gz"
    assert check_suffix("A.JSON", [".json", ".json.gz"]) == ".json"


def test_a_file_that_is_there_is_described_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    out.write_text("12345")
    with pytest.raises(CommandError, match=r"x\.csv exists already, a file of 5 bytes: --force"):
        check_free(out, force=False)
    check_free(out, force=True)
    foreign = tmp_path / "x.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(foreign)
    with pytest.raises(CommandError, match=f"a file of {foreign.stat().st_size:,} bytes"):
        check_free(foreign, force=False)
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(b"PAR1 and no more")
    with pytest.raises(CommandError, match="a file of 16 bytes"):
        check_free(cut, force=False)


def test_a_folder_is_no_place_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is a folder"):
        check_free(tmp_path, force=True)
    with pytest.raises(CommandError, match=r"the folder .*absent does not exist"):
        check_free(tmp_path / "absent" / "x.csv", force=True)


def test_devices_hold_nothing_that_could_be_lost() -> None:
    check_free(Path("/dev/null"), force=False)
    with written_whole(Path("/dev/null")) as place:
        place.write_text("gone")
    assert not Path("/dev/null").is_file()


def test_a_full_disk_names_the_file() -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, written_whole(full) as place:
        place.write_text("x")
    assert caught.value.filename == str(full)


def test_a_failure_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "x.csv"
    out.write_text("before")

    def fill_the_disk() -> None:
        with written_whole(out) as partial:
            partial.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space") as caught:
        fill_the_disk()
    assert caught.value.filename == str(out)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]
    # The passing name is of no use to anyone.
    absent = tmp_path / "absent" / "x.csv"
    with pytest.raises(FileNotFoundError) as caught, written_whole(absent) as partial:
        partial.write_text("x")
    assert caught.value.filename == str(absent)


def test_other_files_keep_their_names() -> None:
    with pytest.raises(FileNotFoundError) as caught, naming(Path("x")):
        Path("other").read_bytes()
    assert caught.value.filename == "other"


def test_what_a_killed_process_left_goes_with_the_next_and_nobody_else_s_does(
    tmp_path: Path,
) -> None:
    out = tmp_path / "x.csv"
    left = tmp_path / ".x.csv.abcd.partial"
    left.mkdir()
    (left / "x.csv").write_text("half")
    others = tmp_path / ".y.csv.abcd.partial"
    others.mkdir()
    with written_whole(out) as first, written_whole(out) as second:
        first.write_text("first")
        second.write_text("second")  # as another process would, at the same time
        assert not left.exists()
    assert out.read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, out.name]


def test_bytes_are_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(fd: int) -> None:
        calls.append(f"fsync {Path(f'/proc/self/fd/{fd}').readlink().name}")
        fsync(fd)

    def noted_replace(self: Path, target: Path) -> Path:
        calls.append(f"rename {target.name}")
        return replace(self, target)

    monkeypatch.setattr("os.fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    with written_whole(tmp_path / "x.csv") as partial:
        partial.write_text("whole")
    assert calls == ["fsync x.csv", "rename x.csv", f"fsync {tmp_path.name}"]


def test_folders_exchange_their_names(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "says").write_text(name)
    exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "says").read_text() == "other"
    assert (tmp_path / "other" / "says").read_text() == "one"
    with pytest.raises(FileNotFoundError) as caught:
        exchange(tmp_path / "absent", tmp_path / "other")
    assert caught.value.filename == str(tmp_path / "other")


def test_a_folder_that_cannot_be_removed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "t.parquet.partial"
    (folder / "scratch").mkdir(parents=True)
    (folder / "scratch" / "keys").touch()

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "keys")

    monkeypatch.setattr(os, "unlink", failing)
    with pytest.raises(OSError, match=r"t\.parquet\.partial'$"):
        remove_tree(folder)
    monkeypatch.setattr(os, "fstat", failing)  # whose error rmtree does not ignore
    drop_tree(folder)
    monkeypatch.undo()
    remove_tree(folder)
    assert not folder.exists()
