# SPDX-License-Identifier: Apache-2.0
"""Factors of every layer of a model from statistics of its activations and gradients, and ranks."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import factor
from .allocate import global_ranks, largest_rank, uniform_rank
from .calibrate import Calibration, Objective, Progress, moments
from .factor import Factors
from .layers import Target
from .sensitivity import Sensitivity, fisher_weights, sensitivities

_GROUP_BYTES = 256 << 20
_RIDGE = 1e-2  # of the mean input energy: directions without data stay as they were


@dataclass
class Plan:
    """What is known of one layer until its rank is."""

    target: Target
    factors: Factors | None = None  # of global ranks, until the rank is known
    spectrum: Tensor | None = None
    error: Tensor | None = None  # relative output error at rank 0, 1, ...
    loss: Tensor | None = None  # predicted change of the model's output at rank 0, 1, ...
    rank: int | None = None
    blocks: int | None = None  # of a Monarch layer, N of N x N
    nnz: int | None = None  # of a sparse plus low-rank layer
    measured: float | None = None
    seconds: float = 0.0
    places: dict[str, nn.Module] = field(default_factory=dict)


def factored(
    model: nn.Module,
    targets: list[Target],
    data: Calibration | None,
    keep: float,
    method: str,
    ranks: str,
    objective: Objective | None,
    seed: int,
    tell: Progress,
) -> list[Plan]:
    """Factors of every layer, from the original model; with uniform ranks its new layers, too."""
    plans = [Plan(target) for target in targets]
    open_plans = [plan for plan in plans if largest_rank(*plan.target.shape)]
    if ranks == "uniform":
        for plan in open_plans:
            plan.rank = uniform_rank(*plan.target.shape, keep)
        open_plans = [plan for plan in open_plans if plan.rank is not None]
    done = 0
    for group in groups(model, open_plans, both_sides=ranks == "global"):
        chosen = [plan.target for plan in group]
        moment: dict[Target, Tensor] = {}
        sensitivity: dict[Target, Sensitivity] = {}
        weights: dict[Target, Tensor] = {}
        if data is not None:
            moment = moments(model, chosen, data, counter("calibrate", data.batches, tell))
            if method == "fisher":
                step = counter("gradients", data.sampled(), tell)
                weights = fisher_weights(model, chosen, data, objective, seed, step)
            if ranks == "global":
                own = None if method == "fisher" else objective
                step = counter("gradients", data.sampled(repeat=True), tell)
                sensitivity = sensitivities(model, chosen, data, own, seed, step)
                sensitivity = {t: s.shrunk(t.weight, moment[t]) for t, s in sensitivity.items()}
        for plan in group:
            begun = time.perf_counter()
            target = plan.target
            W = target.weight
            factors = _closed_form(
                W, method, moment.get(target), sensitivity.get(target), weights.get(target)
            )
            known = moment.pop(target) if data is not None else _identity(W)
            error = factor.errors(W, factors, known)
            plan.error = (error / error[0].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().cpu()
            if target in sensitivity:
                left, right, _ = sensitivity.pop(target)
                plan.loss = factor.errors(W, factors, right, left).cpu()
            plan.spectrum = factors.spectrum.cpu()
            if ranks == "global":
                plan.factors = factors.kept(largest_rank(*target.shape), W.dtype)
            else:
                make(plan, factors.balanced())
            plan.seconds = time.perf_counter() - begun
            done += 1
            tell("factor", done, len(open_plans))
    return plans


def fit_each(
    model: nn.Module,
    plans: list[Plan],
    data: Calibration | None,
    tell: Progress,
    fit: Callable[[Plan, Tensor | None], None],
) -> None:
    """``fit(plan, moment of the inputs)`` for every plan; the moment is ``None`` without data."""
    done = 0
    for group in groups(model, plans, on_inputs=True):
        moment: dict[Target, Tensor] = {}
        if data is not None:
            step = counter("calibrate", data.batches, tell)
            moment = moments(model, [plan.target for plan in group], data, step, on_inputs=True)
        for plan in group:
            begun = time.perf_counter()
            fit(plan, moment.pop(plan.target, None))
            plan.seconds = time.perf_counter() - begun
            done += 1
            tell("factor", done, len(plans))


def damped(moment: Tensor) -> Tensor:
    moment = moment.clone()
    moment.diagonal().add_(_RIDGE * moment.diagonal().mean())
    return moment


def output_error(W: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """``||(W - approximation) C^(1/2)||_F / ||W C^(1/2)||_F`` in float64."""
    E = W.double() - approximation
    lost, whole = ((A @ moment * A).sum().clamp_min(0) for A in (E, W.double()))
    return float((lost / whole).sqrt()) if float(whole) > 0 else 0.0


def make(plan: Plan, factors: Factors) -> None:
    """The new layers, for the rank chosen."""
    if plan.rank is not None:
        plan.places = dict(plan.target.replacements(factors.head(plan.rank)))


def _closed_form(
    W: Tensor,
    method: str,
    moment: Tensor | None,
    sensitivity: Sensitivity | None,
    weights: Tensor | None,
) -> Factors:
    if method == "svd":
        return factor.svd(W)
    if method == "fisher":
        assert weights is not None
        return factor.fisher(W, weights)
    assert moment is not None
    if sensitivity is None or not sensitivity.left.any():
        return factor.whitened(W, moment)
    return factor.two_sided(W, sensitivity.right, sensitivity.left)


def allocate(plans: list[Plan], keep: float) -> None:
    """Global ranks; layers the output does not depend on, as an unused pooler, get uniform ones."""
    plans = [plan for plan in plans if largest_rank(*plan.target.shape)]
    idle = [plan for plan in plans if plan.loss is None or not plan.loss[0] > 0]
    for plan in idle:
        plan.rank = uniform_rank(*plan.target.shape, keep)
    busy = [plan for plan in plans if plan not in idle]
    losses = [plan.loss.tolist() for plan in busy if plan.loss is not None]
    shapes = [plan.target.shape for plan in busy]
    budget = int(keep * sum(m * n for m, n in shapes))
    for plan, rank in zip(busy, global_ranks(shapes, losses, budget), strict=True):
        plan.rank = rank


def groups(
    model: nn.Module, plans: list[Plan], *, both_sides: bool = False, on_inputs: bool = False
) -> Iterator[list[Plan]]:
    """Consecutive layers whose statistics take no more than 256 MiB or a quarter of the model."""
    bound = max(_GROUP_BYTES, sum(p.numel() * p.element_size() for p in model.parameters()) // 4)
    group: list[Plan] = []
    held = 0
    for plan in plans:
        m, n = plan.target.shape
        side = n if on_inputs else min(m, n)
        size = 8 * (side * side + (m * m + side * side if both_sides else 0))
        if group and held + size > bound:
            yield group
            group, held = [], 0
        group.append(plan)
        held += size
    if group:
        yield group


def _identity(W: Tensor) -> Tensor:
    """The moment of white inputs, under which the output error is that of the weight."""
    if factor.on_input_side(W):
        return torch.eye(W.shape[1], dtype=torch.float64, device=W.device)
    return W.double() @ W.double().T


def counter(stage: str, total: int, tell: Progress) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        tell(stage, min(done, total), total)

    return step
