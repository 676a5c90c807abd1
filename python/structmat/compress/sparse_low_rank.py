# SPDX-License-Identifier: Apache-2.0
"""Sparse plus low-rank layers for a model: sizes, and decompositions weighted by the inputs."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import SparseLowRankLinear
from ..sparse_low_rank import decompose
from .calibrate import Calibration, Progress
from .layers import Target, bias_of
from .plan import Plan, damped, fit_each, output_error

_LOW_RANK = 0.25  # of the kept weights


class Shape(NamedTuple):
    rank: int
    nnz: int


def sparse_low_rank_shape(m: int, n: int, keep: float) -> Shape:
    """``rank (m + n) + nnz = floor(keep m n)`` weights, at most a quarter of them of low rank."""
    budget = int(keep * m * n * (1 + 1e-12))
    rank = int(_LOW_RANK * budget / (m + n))
    return Shape(rank, budget - rank * (m + n))


def decomposed(
    model: nn.Module,
    targets: list[Target],
    data: Calibration | None,
    keep: float,
    iterations: int | None,
    seed: int,
    tell: Progress,
) -> list[Plan]:
    """The nearest sparse plus low-rank layers, in the weight or, with data, in the output."""
    plans = [Plan(target) for target in targets]
    for plan in plans:
        plan.rank, plan.nnz = sparse_low_rank_shape(*plan.target.shape, keep)
    options: dict[str, Any] = {"seed": seed}
    if iterations is not None:
        options["iterations"] = iterations
    fit_each(model, plans, data, tell, lambda plan, moment: _decompose(plan, moment, options))
    return plans


def _decompose(plan: Plan, moment: Tensor | None, options: dict[str, Any]) -> None:
    target, rank, nnz = plan.target, plan.rank, plan.nnz
    assert rank is not None
    assert nnz is not None
    (m, n), W = target.shape, target.weight
    density = nnz / (m * n)
    inputs = None if moment is None else damped(moment)
    found = decompose(W, rank, density, inputs=inputs, **options)
    error = found.error
    if moment is not None:
        S = found.pattern.scatter(found.values).double()
        error = output_error(W, found.U.double() @ found.V.double() + S, moment)
    plan.error = torch.tensor([error], dtype=torch.float64)
    made: dict[nn.Module, SparseLowRankLinear] = {}
    first: SparseLowRankLinear | None = None
    for module in target.modules:  # tied layers share their parts, as those of low rank do
        layer = SparseLowRankLinear._of(found, density)
        first = first or layer
        layer.U, layer.V, layer.values = first.U, first.V, first.values
        layer.bias = bias_of(module)
        made[module] = layer
    plan.places = {name: made[module] for name, module in target.places.items()}
