# SPDX-License-Identifier: Apache-2.0
"""examples/train_sparse_low_rank.py and language_model.py: the comparison is fair; it trains."""

import importlib
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from typer.testing import CliRunner

import structmat as sm


@pytest.fixture(scope="module")
def example() -> ModuleType:
    pytest.importorskip("matplotlib")
    return importlib.import_module("train_sparse_low_rank")


@pytest.fixture(scope="module")
def shared(example: ModuleType) -> ModuleType:
    return importlib.import_module("language_model")


def test_text_is_fixed_and_split_by_file(shared: ModuleType) -> None:
    train, validation = shared.library_text(300_000)
    again = shared.library_text(300_000)
    assert torch.equal(train, again[0])
    assert torch.equal(validation, again[1])
    assert 300_000 <= len(train) + len(validation) < 800_000
    assert len(validation) > 0
    assert bytes(validation[:2000].tolist()) not in bytes(train.tolist())


@pytest.mark.parametrize("plan", ["SMALL", "LARGE"])
def test_contenders_have_equal_parameters(example: ModuleType, plan: str) -> None:
    plan = getattr(example, plan)
    runners = example.contenders(plan, plan.width // 8, 0.05)
    with torch.device("meta"):
        models = {runner.name: runner.make() for runner in runners}
    count = {name: model.parameter_count() for name, model in models.items()}
    assert all(model.width == plan.width for name, model in models.items() if "equal" not in name)
    assert count["dense"] > 2.5 * count["uniform"]
    assert 0.85 * count["uniform"] < count["dense, equal parameters"] <= count["uniform"]
    for name in ("columns", "vector16", "block16", "columns, lost", "low rank"):
        assert count[name] == pytest.approx(count["uniform"], rel=0.01)
        assert models[name].flops() == pytest.approx(models["uniform"].flops(), rel=0.01)


def test_places_turn_features(example: ModuleType) -> None:
    """Products of rotated vectors depend on the distance of their places alone."""
    torch.manual_seed(0)
    q, k = (example.rotated(torch.randn(8).expand(6, 8)) for _ in range(2))
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])
    assert not torch.allclose(scores[0], scores[0, 0].expand(6))


def test_learning_rates_reach_every_parameter_once(shared: ModuleType) -> None:
    n, m, rank = 32, 48, 4
    sparse = sm.nn.SparseLowRankLinear(n, m, rank, 0.125, family="columns")
    monarch = sm.nn.MonarchLinear(n, m, 4)
    low_rank, dense = sm.nn.LowRankLinear(n, m, rank), torch.nn.Linear(n, m)
    model = torch.nn.ModuleList([sparse, monarch, low_rank, dense])
    groups = shared.parameter_groups(model, 1.0)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    rate = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    assert rate[dense.weight] == 128 / 32
    assert (rate[low_rank.V], rate[low_rank.U]) == (128 / 64, 128 / 8)
    assert (rate[sparse.V], rate[sparse.U], rate[sparse.values]) == (128 / 96, 128 / 12, 128 / 12)
    assert (rate[monarch.W1], rate[monarch.W2]) == (128 / 16, 128 / (2 * 4 * monarch.rank))
    assert rate[dense.bias] == rate[sparse.bias] == 1


def test_all_learn_in_ten_steps(example: ModuleType, tmp_path: Path) -> None:
    plan = replace(example.SMALL, width=32, depth=1, context=32)
    plan = replace(plan, steps=10, evaluations=2, validation=8)
    runners = example.contenders(plan, 4, 0.25)
    example.train(plan, runners, 2, "cpu")
    for runner in runners:
        assert len(runner.times) == 20
        for losses in runner.losses:
            assert losses[1] < losses[0] < math.log(256)
            assert losses[1] < (5 if runner.name == "columns, lost" else 4)  # at a low rate
    for values in example.differences(runners).values():
        assert len(values) == 2
        assert max(map(abs, values)) < 1.5
    example.picture(plan, runners, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert example.table(runners).row_count == 8
    assert example.difference_table(runners).row_count == 7


def test_memory_is_that_of_the_tensors(example: ModuleType, shared: ModuleType) -> None:
    plan = replace(example.SMALL, width=32, depth=1, context=32)
    dense, _, uniform, *_ = example.contenders(plan, 4, 0.25)
    batch = torch.randint(256, (8, 33))
    indices = []
    for runner in (dense, uniform):
        run = shared.Run.start(runner.make(), plan)
        run.step(batch)
        state, saved = run.memory(batch)
        parameters = list(run.model.parameters())
        # Beside its moments AdamW has a number of steps for each.
        indices.append(state - 4 * 4 * run.model.parameter_count() - 4 * len(parameters))
        assert saved >= 4 * 8 * 32 * 256  # the logits alone
        assert run.memory(batch[:4])[1] == pytest.approx(saved / 2, rel=0.02)
    entries = sum(p.numel() for name, p in uniform.make().named_parameters() if "values" in name)
    assert indices[0] == 0
    assert 8 * entries < indices[1] < 16 * entries


def test_command(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    app = example.typer.Typer()
    app.command()(example.main)
    options = ["--steps", "1", "--width", "32", "--density", "0.1", "--out", "b.png"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "b.png").exists()
    assert "dense, equal parameters" in result.output
