# SPDX-License-Identifier: Apache-2.0
"""Monarch layers for a model: block counts, ranks, and projections weighted by the inputs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..monarch import project, to_dense
from ..nn import MonarchLinear
from .allocate import uniform_rank
from .calibrate import Calibration, Progress
from .layers import Target, bias_of
from .plan import Plan, damped, fit_each, output_error


class Shape(NamedTuple):
    n_blocks: int
    rank: int


def monarch_shape(m: int, n: int, keep: float) -> Shape | None:
    """``N x N`` blocks of rank ``R``: ``N R (m + n)`` weights, at most ``keep m n``.

    The weights, and the time, depend on ``N R`` alone, which is the rank that a low-rank layer of
    that size would have; the fewer blocks, the more of ``W`` they keep. Hence ``N`` is the least
    above one that divides both sizes into blocks of multiples of 64, else 32, 16, 8 or any.
    ``None`` where there is no such count, or none with fewer weights than ``m n``.
    """
    share = uniform_rank(m, n, keep)
    for multiple in (64, 32, 16, 8, 1):
        for count in range(2, min(share or 0, min(m, n) // multiple) + 1):
            if m % (count * multiple) or n % (count * multiple):
                continue
            return Shape(count, min((share or 0) // count, min(m, n) // count))
    return None


def projected(
    model: nn.Module,
    targets: list[Target],
    data: Calibration | None,
    keep: float,
    tell: Progress,
) -> list[Plan]:
    """The nearest Monarch layers, in the weight or, with data, in the output."""
    plans = [Plan(target) for target in targets]
    for plan in plans:
        shape = monarch_shape(*plan.target.shape, keep)
        if shape is not None:
            plan.blocks, plan.rank = shape
    chosen = [plan for plan in plans if plan.rank is not None]
    fit_each(model, chosen, data, tell, _project)
    return plans


def _project(plan: Plan, moment: Tensor | None) -> None:
    target, N, R = plan.target, plan.blocks, plan.rank
    assert N is not None
    assert R is not None
    W = target.weight
    if moment is None:
        W1, W2 = found = project(W, N, N, R)
        error = found.error
    else:
        W1, W2 = project(W, N, N, R, inputs=damped(moment))
        error = output_error(W, to_dense(W1.double(), W2.double()), moment)
    plan.error = torch.tensor([error], dtype=torch.float64)
    made: dict[nn.Module, MonarchLinear] = {}
    first: MonarchLinear | None = None
    for module in target.modules:  # tied layers share their factors, as those of low rank do
        m, n = target.shape
        layer = MonarchLinear(n, m, N, rank=R, bias=False, device="meta")
        if first is None:
            layer.W1 = nn.Parameter(W1.to(W, copy=True).contiguous())
            layer.W2 = nn.Parameter(W2.to(W, copy=True).contiguous())
            first = layer
        else:
            layer.W1, layer.W2 = first.W1, first.W2
        layer.bias = bias_of(module)
        made[module] = layer
    plan.places = {name: made[module] for name, module in target.places.items()}
