# SPDX-License-Identifier: Apache-2.0
"""examples/train_monarch.py: what it compares is comparable, and it trains."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_monarch.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("train_monarch", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_monarch"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_text_is_fixed_and_split_by_file(example: ModuleType) -> None:
    train, validation = example.library_text(300_000)
    again = example.library_text(300_000)
    assert torch.equal(train, again[0])
    assert torch.equal(validation, again[1])
    assert 300_000 <= len(train) + len(validation) < 800_000
    assert len(validation) > 0
    assert bytes(validation[:2000].tolist()) not in bytes(train.tolist())


def test_contenders_are_as_named(example: ModuleType) -> None:
    plan = example.Plan()
    with torch.device("meta"):
        dense, same, flops, size = (c.make() for c in example.contenders(plan, None))
    assert same.width == dense.width < flops.width
    assert same.flops() < dense.flops()
    assert 0.85 * dense.flops() < flops.flops() <= dense.flops()
    assert 0.85 * dense.parameter_count() < size.parameter_count() <= dense.parameter_count()
    blocks = 12 * dense.width**2 + 2 * plan.context * dense.width  # of one layer, a token
    assert dense.flops() == 6 * (plan.depth * blocks + 256 * dense.width)


def test_all_learn_in_twenty_steps(example: ModuleType, tmp_path: Path) -> None:
    plan = example.Plan()
    plan = replace(plan, width=32, depth=1, context=32, steps=20, evaluations=2, validation=8)
    runners = example.contenders(plan, 4)
    example.train(plan, runners, 2, "cpu")
    for runner in runners:
        assert len(runner.times) == 40
        for losses in runner.losses:
            assert losses[1] < losses[0] < math.log(256)
            assert losses[1] < 4
    example.picture(plan, runners, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert example.table(runners).row_count == 4


def test_command(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = example.typer.Typer()
    app.command()(example.main)
    result = CliRunner().invoke(app, ["--steps", "1", "--width", "32", "--out", "b.png"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b.png").exists()
    assert "Monarch, equal FLOPs" in result.output
