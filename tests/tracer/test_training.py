"""The training script of the bundled model: what it holds out, and that a kill costs no step."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "runtime" / "training"
TEXT = "".join(f"Line {i} of a short text, with some words in it.\n" for i in range(400))


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("tiny_train")


@pytest.fixture
def sources(training: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "prose.txt").write_text(TEXT)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f(x):\n    return x + 1\n" * 200)
    (tmp_path / "code" / "test").mkdir()
    (tmp_path / "code" / "test" / "b.py").write_text("never read\n")
    return training.read_sources([tmp_path / "prose.txt", tmp_path / "code"], python=False)


def test_the_tail_is_held_out(sources: Any) -> None:
    prose, code = sources
    assert (prose.kind, code.kind) == ("prose", "code")
    for source in sources:
        training, held_out = source.split()
        assert "".join(training) + held_out == "".join(source.documents)
        assert 0.03 < len(held_out) / source.n_bytes < 0.05
        assert "never read" not in "".join(source.documents)
    assert held_out in code.documents[-1]
    assert prose.split()[1].startswith("Line ")


def test_balance_is_best_when_each_layer_is_even(training: ModuleType) -> None:
    """Two layers that collapse on different experts look even when pooled; not layer by layer."""
    one, other = torch.full((16, 4), -9.0), torch.full((16, 4), -9.0)
    one[:, :2], other[:, 2:] = 9.0, 9.0
    collapsed, _ = training.router_losses((one, other), 2)
    rows = torch.arange(16)
    even = torch.full((16, 4), -9.0)
    even[rows, rows % 4] = even[rows, (rows + 1) % 4] = 9.0
    balanced, _ = training.router_losses((even, even), 2)
    assert balanced.item() == pytest.approx(2.0, abs=0.01)
    assert collapsed.item() == pytest.approx(4.0, abs=0.01)


def test_training_goes_on_after_a_kill(
    training: ModuleType, sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = training.Shape(
        vocabulary=300, hidden=32, intermediate=32, layers=2, experts=4, heads=2, context=16
    )
    streams = training.token_streams(sources, training.train_tokenizer(sources, shape))
    monkeypatch.setattr(training, "CHECKPOINT_EVERY_S", -1.0)

    def run(name: str, killed_at: int | None = None) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        model = training.build_model(shape, seed=0)
        training.use_training_kernels(model)
        draw = training.draw_batch

        def until(*arguments: Any) -> Any:
            if arguments[-1] == killed_at:
                raise KeyboardInterrupt
            return draw(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(training, "draw_batch", until)
            training.train(model, streams, out=folder, steps=5, rows=4, rate=4e-3, seed=0)
        weights: dict[str, torch.Tensor] = model.state_dict()
        return weights

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("killed", killed_at=3)
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["state.pt"]
    resumed = run("killed")
    for name, weight in straight.items():
        np.testing.assert_array_equal(resumed[name].numpy(), weight.numpy(), err_msg=name)
    fresh = training.build_model(shape, seed=0).state_dict()
    assert any(not torch.equal(fresh[name], straight[name]) for name in fresh)
