# SPDX-License-Identifier: Apache-2.0
"""Second pass: each layer fitted to the inputs that the compressed layers before it deliver.

Layers fed the same tensor (query, key, value) form a stage. For one stage after another the
original and the partly compressed model run up to it, side by side, batch by batch; of their inputs
``x`` and ``x'`` only ``E[x' x'^T]`` and ``E[x x'^T]`` are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import factor
from .calibrate import (
    Batch,
    Calibration,
    Masks,
    Progress,
    gram,
    modules_of,
    observing,
    rows,
    run,
    without_bias,
)
from .factor import Factors
from .layers import Target, put


class Fit(NamedTuple):
    """The layers of a target, its relative errors at rank 0 .. r, the measured one, spectrum."""

    layers: dict[str, nn.Module]
    errors: Tensor
    measured: float
    spectrum: Tensor


class _Reached(BaseException):
    """Ends a forward pass at the last layer looked at, past any ``except Exception`` in it."""


def fit_in_sequence(
    model: nn.Module,
    stages: Sequence[Sequence[Target]],
    ranks: Mapping[Target, int],
    first: Mapping[Target, Factors],
    data: Calibration,
    tell: Progress,
) -> dict[Target, Fit]:
    """Fits every target that has a rank; ``stages`` as :func:`stages_of` gives them.

    Of a target in ``first`` (factors optimal in the model's output, cut to its rank) only ``V`` is
    fitted; otherwise the layer's own output error is the aim and both are (reduced-rank
    regression).

    Raises:
        ValueError: the compressed model sends a layer other rows than the original, as routing to
            experts can; NaN or Inf.
    """
    stages = [[target for target in stage if target in ranks] for stage in stages]
    stages = [stage for stage in stages if stage]
    placed: dict[str, nn.Module] = {}
    new: dict[Target, dict[str, nn.Module]] = {}
    errors: dict[Target, Tensor] = {}
    measured: dict[Target, float] = {}
    spectra: dict[Target, Tensor] = {}
    before: Sequence[Target] = []
    energy: dict[Target, float] = {}
    for done, stage in enumerate([*stages, []]):
        sums = _Sums(stage)
        misses = {target: 0.0 for target in before}
        for batch in data:
            _side_by_side(model, batch, placed, new, before, stage, sums, misses)
        for target in before:
            measured[target] = (misses[target] / max(energy[target], 1e-300)) ** 0.5
        energy = sums.energy
        for target in stage:
            if not torch.isfinite(sums.moment).all():
                raise ValueError(f"compress: the activations of {target.name} have NaN or Inf")
            factors = factor.regressed(
                target.weight, sums.moment, sums.cross, ranks[target], first=first.get(target)
            )
            factors = factors.balanced()
            error = factor.regression_errors(
                target.weight, factors, sums.moment, sums.cross, energy[target]
            )
            errors[target] = (error / max(energy[target], 1e-300)).sqrt().cpu()
            new[target] = dict(target.replacements(factors))
            spectra[target] = factors.spectrum.cpu()
            placed.update(new[target])
        before = stage
        tell("sequential", done, len(stages))
    return {
        target: Fit(new[target], errors[target], measured[target], spectra[target])
        for target in new
    }


class _Sums:
    """Of one stage: ``sum x' x'^T``, ``sum x x'^T`` and each target's ``sum ||W x||^2``."""

    moment: Tensor
    cross: Tensor

    def __init__(self, stage: Sequence[Target]):
        self.energy = {target: 0.0 for target in stage}
        self._started = False

    def add(self, original: Tensor, compressed: Tensor) -> None:
        moment, cross = gram(compressed, compressed), gram(original, compressed)
        if self._started:
            moment, cross = moment.add_(self.moment), cross.add_(self.cross)
        self.moment, self.cross, self._started = moment, cross, True


def _side_by_side(
    model: nn.Module,
    batch: Batch,
    placed: dict[str, nn.Module],
    new: dict[Target, dict[str, nn.Module]],
    before: Sequence[Target],
    stage: Sequence[Target],
    sums: _Sums,
    misses: dict[Target, float],
) -> None:
    """One batch through both models: sums of ``stage``, errors made by ``before``."""
    masks = Masks(model, batch)
    outputs: dict[Target, Tensor] = {}
    inputs: list[Tensor] = []
    called: set[Target] = set()
    last = stage[-1] if stage else before[-1]

    def original(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> None:
        mask = masks.of(target)
        bare = rows(without_bias(module, y), mask)
        if target in called:
            raise _called_again(target)
        called.add(target)
        if target in misses:
            outputs[target] = bare.clone()  # what follows may write to it
        else:
            if not inputs:
                inputs.append(rows(x, mask).clone())
            sums.energy[target] += bare.double().square().sum().item()
        if target is last:
            raise _Reached

    def compressed(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> None:
        mask = masks.of(target)
        if target in misses:
            got = rows(without_bias(module, y), mask)
            wanted = outputs.get(target, got[:0])
            _check_rows(target, wanted, got)
            misses[target] += (got - wanted).double().square().sum().item()
        elif len(inputs) == 1:
            inputs.append(rows(x, mask).clone())
            _check_rows(target, *inputs)
        if target is last:
            raise _Reached

    with torch.no_grad():
        with observing(modules_of([*before, *stage]), original):
            _run_until_reached(model, batch)
        layers = [(target, layer) for target in before for layer in new[target].values()]
        with placing(model, placed), observing([*layers, *modules_of(stage)], compressed):
            _run_until_reached(model, batch)
        if len(inputs) == 1:
            raise ValueError(
                f"compress: sequential: the original model reaches {stage[0].name}, the compressed "
                "one does not; leave it out by filter"
            )
        if inputs:
            sums.add(*inputs)


def _check_rows(target: Target, original: Tensor, compressed: Tensor) -> None:
    if original.shape != compressed.shape:
        raise ValueError(
            f"compress: sequential needs the same rows at {target.name} in the original and the "
            f"compressed model, got {tuple(original.shape)} and {tuple(compressed.shape)}"
        )


def _run_until_reached(model: nn.Module, batch: Batch) -> None:
    with suppress(_Reached):
        run(model, batch)


def _called_again(target: Target) -> ValueError:
    return ValueError(
        f"compress: sequential cannot fit {target.name}, the model calls it more than once; leave "
        "it out by filter"
    )


def stages_of(model: nn.Module, targets: list[Target], data: Calibration) -> list[list[Target]]:
    """Targets in the order of their calls, those fed the same tensor together.

    Raises:
        ValueError: a target is tied to another, called twice, or not reached by the first batch.
    """
    for target in targets:
        if len(target.places) > 1:
            raise ValueError(
                f"compress: sequential cannot fit tied layers, {', '.join(target.places)} share "
                "one weight; leave them out by filter"
            )
    stages: list[list[Target]] = []
    fed: list[Any] = []  # the tensor last seen and its version

    def see(target: Target, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if any(target in stage for stage in stages):
            raise _called_again(target)
        if fed and fed[0] is x and fed[1] == x._version:
            stages[-1].append(target)
        else:
            stages.append([target])
            fed[:] = x, x._version

    with torch.no_grad(), observing(modules_of(targets), see):
        run(model, next(iter(data)))
    for target in targets:
        if not any(target in stage for stage in stages):
            raise ValueError(
                f"compress: sequential takes the order of layers from the first calibration batch, "
                f"which does not reach {target.name}; begin with one that does, or leave it out by "
                "filter"
            )
    return stages


@contextmanager
def placing(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """The model with ``layers`` in their places, for a while."""
    old = {name: model.get_submodule(name) for name in layers}
    try:
        put(model, layers)
        yield
    finally:
        put(model, old)
