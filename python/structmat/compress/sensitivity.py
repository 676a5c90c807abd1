# SPDX-License-Identifier: Apache-2.0
"""How a layer's error moves the model's output, from gradients of random projections of it.

For a sequence ``b`` let ``G_b = sum_t g_t x_t^T`` be the gradient of ``<v, output>`` in a layer's
weight, ``v ~ N(0, I)``. The squared change of the output under a small weight error ``E`` is then
``E_b,v <G_b, E>^2`` (Gauss-Newton), here approximated by a Kronecker product:

    ``tr(L E R E^T)``,   ``L = E[G G^T] / E||G||_F^2``,   ``R = E[G^T G]``

(Gupta et al. 2018, arXiv:1802.09568). ``G_b`` itself is never formed: both come from the Gram
matrices of ``x`` and ``g`` over the sequence.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calibrate import (
    Batch,
    Calibration,
    Masks,
    Objective,
    check_reached,
    main_output,
    modules_of,
    observing,
    run,
    sequences,
    wide,
    without_bias,
)
from .factor import on_input_side
from .layers import Target

# Sequences at which the gradients count as much as what they are drawn towards.
_PRIOR_LEFT = 6
_PRIOR_RIGHT = 64
_GRAM_NUMBERS = 1 << 24  # of the Gram matrices held at a time


class Sensitivity(NamedTuple):
    """``left (m, m)`` of trace one or zero; ``right``: ``R``, or ``W R W^T`` on the output side.

    ``sequences``: how many different ones they were taken over.
    """

    left: Tensor
    right: Tensor
    sequences: int

    def shrunk(self, W: Tensor, moment: Tensor) -> "Sensitivity":
        """``R`` drawn towards the moment of the inputs, ``L`` towards the identity.

        Few sequences leave directions without any gradient, which would count for nothing. On
        MiniLM at keep 0.5 this lifts the cosine of held-out text from 0.28 to 0.71 with 20 short
        sequences of calibration, and hardly changes it (0.889, 0.890) with 270.
        """
        m = len(self.left)
        eye = torch.eye(m, dtype=self.left.dtype, device=self.left.device)
        a = _PRIOR_LEFT / self.sequences
        left = (self.left + a * self.left.trace() / m * eye) / (1 + a)
        if on_input_side(W):
            W = W.double()
            energies = ((W @ self.right) * W).sum(), ((W @ moment) * W).sum()
        else:
            energies = self.right.trace(), moment.trace()
        b = _PRIOR_RIGHT / self.sequences
        prior = moment * (energies[0] / energies[1].clamp_min(torch.finfo(moment.dtype).tiny))
        return Sensitivity(left, (self.right + b * prior) / (1 + b), self.sequences)


class _Call(NamedTuple):
    """One call ``y = W x + b`` of a target, and the gradient ``g`` in ``y``."""

    target: Target
    module: nn.Module
    x: Tensor
    y: Tensor
    g: Tensor


def sensitivities(
    model: nn.Module,
    targets: Sequence[Target],
    data: Calibration,
    objective: Objective | None,
    seed: int,
    step: Callable[[], None],
) -> dict[Target, Sensitivity]:
    """Sensitivities of the model's output, or of ``objective(output, batch)``, to each target.

    Raises:
        ValueError: the objective does not depend on the layers by differentiable steps; NaN or Inf.
    """
    sums: dict[Target, tuple[Tensor, Tensor]] = {}
    count = 0

    def add(target: Target, module: nn.Module, x: Tensor, y: Tensor, g: Tensor) -> None:
        inside = on_input_side(target.weight)
        m, s = g.shape[-1], (x if inside else y).shape[-1]
        if target not in sums:
            zeros = torch.zeros(0, dtype=torch.float64, device=g.device).new_zeros
            sums[target] = zeros(m, m), zeros(s, s)
        left, right = sums[target]
        for xb, yb, gb in _chunks(x, y, g):
            zb = xb if inside else without_bias(module, yb)
            left += torch.einsum("btm,btk->mk", gb, (xb @ xb.mT) @ gb)
            right += torch.einsum("bts,btk->sk", zb, (gb @ gb.mT) @ zb)

    for masks, value, seen in _gradients(model, targets, data.sample(repeat=True), objective, seed):
        count += value.shape[0] if value.ndim else 1
        for target, module, x, y, g in seen:
            add(target, module, *(sequences(a, masks.of(target)) for a in (x, y, g)))
        step()
    check_reached(targets, sums)
    result = {}
    for target, (left, right) in sums.items():
        if not (torch.isfinite(left).all() and torch.isfinite(right).all()):
            raise ValueError(
                f"compress: the gradients at {target.name} have NaN or Inf, or overflow"
            )
        trace = left.trace()
        result[target] = Sensitivity(
            left / trace if trace > 0 else left, right / count, max(1, count // data.repeats)
        )
    return result


def fisher_weights(
    model: nn.Module,
    targets: Sequence[Target],
    data: Calibration,
    objective: Objective | None,
    seed: int,
    step: Callable[[], None],
) -> dict[Target, Tensor]:
    """``f_j = E sum_i G_ij^2 (n,)``: squared gradients of the loss, summed over a column of ``W``.

    The loss is ``objective(output, batch)``, or the output's own ``loss`` (batches with labels).

    Raises:
        ValueError: there is no loss; NaN or Inf.
    """
    sums: dict[Target, Tensor] = {}
    for masks, _, seen in _gradients(model, targets, data.sample(), objective or _loss, seed):
        for target, _, x, _, g in seen:
            total = sums.setdefault(target, x.new_zeros(x.shape[-1], dtype=torch.float64))
            for xb, gb in _chunks(*(sequences(a, masks.of(target)) for a in (x, g))):
                total += (xb * ((gb @ gb.mT) @ xb)).sum((0, 1), dtype=torch.float64)
        step()
    check_reached(targets, sums)
    for target, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"compress: the gradients at {target.name} have NaN or Inf, or overflow"
            )
    return sums


def _chunks(*parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few sequences at a time, in the type of products."""
    chunk = max(1, _GRAM_NUMBERS // max(1, parts[0].shape[1]) ** 2)
    for some in zip(*(part.split(chunk) for part in parts), strict=True):
        yield tuple(wide(part) for part in some)


def _gradients(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Iterable[Batch],
    objective: Objective | None,
    seed: int,
) -> Iterator[tuple[Masks, Tensor, list[_Call]]]:
    """For each batch its masks, the value of the objective, and each call of a target."""
    generator = torch.Generator().manual_seed(seed)
    for batch in batches:
        masks = Masks(model, batch)
        mask = masks.output
        calls: list[_Call] = []
        last: list[Any] = []  # the tensor last seen, its version and its copy

        def see(
            target: Target,
            module: nn.Module,
            x: Tensor,
            y: Tensor,
            calls: list[_Call] = calls,
            last: list[Any] = last,
        ) -> Tensor:
            y = y if y.requires_grad else y.requires_grad_()
            if not (last and last[0] is x and last[1] == x._version):
                last[:] = x, x._version, x.detach().clone()  # what follows may write to it
            calls.append(_Call(target, module, last[2], y, y))
            return y.clone()  # what follows may write to it

        with torch.enable_grad(), observing(modules_of(targets), see):
            output = run(model, batch)
            value = objective(output, batch) if objective else main_output(output)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise ValueError(
                "compress: objective must return a tensor that depends on the layers by "
                f"differentiable operations, got {type(value).__name__}"
            )
        if value.numel() == 1:
            probe = torch.ones_like(value)
        else:
            probe = torch.randn(value.shape, generator=generator).to(value)
            if mask is not None and value.shape[:2] == mask.shape:
                probe = probe * mask.to(probe.device).reshape(
                    *mask.shape, *[1] * (value.ndim - 2)
                ).to(probe)
        outputs = [call.y for call in calls]
        gradients = torch.autograd.grad(value, outputs, probe, allow_unused=True)
        seen = [
            call._replace(y=call.y.detach(), g=torch.zeros_like(call.y) if g is None else g)
            for call, g in zip(calls, gradients, strict=True)
        ]
        last.clear()
        yield masks, value.detach(), seen


def _loss(output: object, batch: Batch) -> Tensor:
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "compress: method='fisher' needs a loss: put labels into the calibration batches, or "
            "give objective, a function of (output, batch)"
        )
    return loss
