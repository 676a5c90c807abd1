# SPDX-License-Identifier: Apache-2.0
"""examples/train_monarch.py: what it compares is comparable, and it trains."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("matplotlib")
    return importlib.import_module("train_monarch")


def test_contenders_are_as_named(example: ModuleType) -> None:
    plan = example.SMALL
    with torch.device("meta"):
        dense, same, flops, size = (c.make() for c in example.contenders(plan, None))
    assert same.width == dense.width < flops.width
    assert same.flops() < dense.flops()
    assert 0.85 * dense.flops() < flops.flops() <= dense.flops()
    assert 0.85 * dense.parameter_count() < size.parameter_count() <= dense.parameter_count()
    blocks = 12 * dense.width**2 + 2 * plan.context * dense.width  # of one layer, a token
    assert dense.flops() == 6 * (plan.depth * blocks + 256 * dense.width)


def test_all_learn_in_twenty_steps(example: ModuleType, tmp_path: Path) -> None:
    plan = replace(example.SMALL, width=32, depth=1, context=32)
    plan = replace(plan, steps=20, evaluations=2, validation=8)
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
