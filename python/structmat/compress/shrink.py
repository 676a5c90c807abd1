# SPDX-License-Identifier: Apache-2.0
"""A saved model at a smaller budget: the leading parts of its factors."""

import math
from dataclasses import replace as changed
from typing import Any

from torch import Tensor

from .allocate import global_ranks, largest_rank, parameters, uniform_rank
from .report import CompressionReport

_FIXED = {"monarch": "Monarch", "sparse_low_rank": "sparse plus low-rank"}


def shrink(
    layers: list[dict[str, Any]],
    reports: list[CompressionReport],
    state: dict[str, Tensor],
    keep: float,
) -> list[CompressionReport]:
    """Cuts the factors in ``state`` to a smaller budget; ``layers`` gets the new ranks.

    Layers that were compressed to less than ``keep`` stay as they are.

    Raises:
        ValueError: ``keep`` is larger than what is stored, or too small for it.
    """
    if not isinstance(keep, int | float) or not 0 < keep < 1:
        raise ValueError(f"load_pretrained: keep must lie between 0 and 1, got {keep!r}")
    if not reports:
        raise ValueError(
            "load_pretrained: the folder holds no report, so it can only be loaded whole"
        )
    stored = max(report.keep for report in reports)
    if keep > stored:
        raise ValueError(f"load_pretrained: the model was compressed to keep={stored}, got {keep}")
    ranks: dict[str, int] = {}
    smaller = []
    for report in reports:
        if keep < report.keep:
            fixed = next((_FIXED[x.kind] for x in report.layers if x.kind in _FIXED), None)
            if fixed is not None:
                raise ValueError(
                    f"load_pretrained: {fixed} layers have no leading part: the model can be "
                    f"loaded with keep={report.keep} or without, got {keep}"
                )
            found = _ranks(report, keep)
            report = _shortened(report, keep, found)
            ranks.update(found)
        smaller.append(report)
    for layer in layers:
        rank = next((ranks[name] for name in layer["places"] if name in ranks), layer["rank"])
        layer["rank"] = rank
        for place in layer["places"]:
            if f"{place}.U" in state:
                state[f"{place}.U"] = state[f"{place}.U"][:, :rank].contiguous()
            if f"{place}.V" in state:
                state[f"{place}.V"] = state[f"{place}.V"][:rank].contiguous()
    return smaller


def _ranks(report: CompressionReport, keep: float) -> dict[str, int]:
    """As :func:`structmat.compress` chooses them, but never more than are stored."""
    low = [layer for layer in report.layers if layer.rank is not None]
    ranks: dict[str, int] = {}
    for layer in low:
        rank = uniform_rank(layer.m, layer.n, keep)
        ranks[layer.name] = min(layer.rank or 1, rank or layer.rank or 1)
    if report.ranks != "global":
        return ranks
    shared = [x for x in report.layers if largest_rank(x.m, x.n) and (x.sensitivity or 0) > 0]
    busy = [x for x in shared if x.rank is not None]
    if busy:
        total = sum(x.params_before for x in shared)
        dense = sum(x.params_before for x in shared if x.rank is None)
        least = dense + sum(parameters(x.m, x.n, 1) for x in busy)
        if int(keep * total) < least:
            smallest = math.ceil(least / total * 1e4 + 1e-6) / 1e4
            raise ValueError(
                f"load_pretrained: the smallest keep this model can be loaded with is {smallest}, "
                f"layers stored dense staying so, got {keep}"
            )
        shapes, losses = [(x.m, x.n) for x in busy], [x.loss for x in busy]
        found = global_ranks(shapes, losses, int(keep * total) - dense, dense=False)
        ranks.update({x.name: rank or 1 for x, rank in zip(busy, found, strict=True)})
    return ranks


def _shortened(report: CompressionReport, keep: float, ranks: dict[str, int]) -> CompressionReport:
    layers = []
    for old in report.layers:
        rank = ranks.get(old.name)
        if rank is not None and (rank != old.rank or report.sequential):
            # What a sequential fit is fed depends on the ranks before it: its errors are unknown.
            errors = [] if report.sequential else old.errors[: rank + 1]
            old = changed(
                old,
                rank=rank,
                params_after=parameters(old.m, old.n, rank),
                predicted_error=errors[-1] if errors else None,
                measured_error=None,
                errors=errors,
                loss=old.loss[: rank + 1],
            )
        layers.append(old)
    kept = sum(x.params_after for x in layers) / sum(x.params_before for x in layers)
    return changed(report, keep=keep, kept=kept, layers=layers)
