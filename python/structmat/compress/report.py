# SPDX-License-Identifier: Apache-2.0
"""What a compression did, layer by layer."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn


@dataclass
class LayerReport:
    """One compressed (or kept) layer.

    Attributes:
        name: where it is in the model.
        places: every name it has: more than one where layers are tied, which share one report.
        kind: ``"low_rank"``, ``"monarch"``, ``"sparse_low_rank"``, or ``"dense"`` where it was left
            as it is.
        m, n: output and input features.
        rank: of the new weight, of each block of a Monarch layer; ``None`` for a dense layer.
        params_before, params_after: weights, biases not counted.
        predicted_error: relative output error ``||Y - Y'||_F / ||Y||_F`` from the moments alone
            (biases not counted). Without calibration data, that of the weight itself. ``None``
            where a ``sequential`` model was loaded at a smaller ``keep``.
        measured_error: the same, measured by running the calibration data again.
        sensitivity: predicted squared change of the model's output, per sequence, if the layer's
            weight were zero; ``None`` where it was not estimated.
        spectrum: of the matrix whose SVD gave the factors, descending; its tail beyond ``rank`` is
            what was cut.
        errors: predicted relative output error at rank ``0, 1, ..., rank``.
        loss: predicted loss at rank ``0, 1, ..., rank`` of a ``global`` allocation, else empty.
        seconds: spent on its factors.
        n_blocks: ``N`` of the ``N x N`` blocks of a Monarch layer, else ``None``.
        nnz: the entries of ``S`` in a sparse plus low-rank layer, else ``None``.

    Example:
        >>> import torch, structmat as sm
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> layer = sm.compress(model, keep=0.5, method="svd").layers[0]
        >>> layer.name, layer.kind, layer.rank, layer.params_after
        ('0', 'low_rank', 10, 960)
    """

    name: str
    places: list[str]
    kind: str
    m: int
    n: int
    rank: int | None
    params_before: int
    params_after: int
    predicted_error: float | None
    measured_error: float | None = None
    sensitivity: float | None = None
    spectrum: list[float] = field(default_factory=list, repr=False)
    errors: list[float] = field(default_factory=list, repr=False)
    loss: list[float] = field(default_factory=list, repr=False)
    seconds: float = 0.0
    n_blocks: int | None = None
    nnz: int | None = None

    @property
    def size(self) -> str:
        """The rank for tables: ``"dense"``, ``"25"``, ``"4 x 6"`` for 4 blocks of rank 6, or
        ``"25 + 9.5%"`` for rank 25 and a sparse part of that density."""
        if self.rank is None:
            return "dense"
        if self.nnz is not None:
            return f"{self.rank} + {self.nnz / (self.m * self.n):.1%}"
        return str(self.rank) if self.n_blocks is None else f"{self.n_blocks} x {self.rank}"


@dataclass
class CompressionReport:
    """What :func:`structmat.compress` did.

    Attributes:
        method, ranks, sequential, keep, seed: as they were asked for.
        kept: fraction of the weights of the chosen layers that is left.
        layers: one report per layer, in the order in which the model runs them.
        calibration_hash: SHA-256 of the calibration batches, ``None`` without.
        tokens: rows (tokens that are not padding) the moments were taken over.
        seconds: wall time.
        peak_memory: bytes beyond what was held at the start: of the CUDA allocator for a model
            there, else of the process; ``None`` where the system does not tell.

    Example:
        >>> import torch, structmat as sm
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> report = sm.compress(model, keep=0.5, method="svd")
        >>> report.method, round(report.kept, 3), len(report.to_dict()["layers"])
        ('svd', 0.469, 1)
    """

    method: str
    ranks: str
    sequential: bool
    keep: float
    seed: int
    kept: float
    layers: list[LayerReport]
    calibration_hash: str | None
    tokens: int
    seconds: float
    peak_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists: what ``json.dumps`` takes."""
        return asdict(self)

    def __str__(self) -> str:
        before = sum(layer.params_before for layer in self.layers)
        after = sum(layer.params_after for layer in self.layers)
        how = f"{self.method}, {self.ranks} ranks" + (", sequential" if self.sequential else "")
        lines = [
            f"{how}: {len(self.layers)} layers, {before:,} -> {after:,} weights ({self.kept:.1%})"
            f", {self.tokens:,} tokens, {self.seconds:.1f} s",
        ]
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines.append(
            f"{'layer':{width}}  {'m x n':>13}  {'rank':>6}  {'kept':>6}  predicted  measured"
        )
        for layer in self.layers:
            predicted, measured = (
                "-" if error is None else f"{error:.4f}"
                for error in (layer.predicted_error, layer.measured_error)
            )
            lines.append(
                f"{layer.name:{width}}  {f'{layer.m} x {layer.n}':>13}  {layer.size:>6}  "
                f"{layer.params_after / layer.params_before:6.1%}  {predicted:>9}  {measured:>8}"
            )
        return "\n".join(lines)


def attach(model: nn.Module, report: CompressionReport) -> None:
    """Keeps the report with the model, for :func:`structmat.save_pretrained`.

    Earlier ones stay, without the layers that this one names: those they had left dense.
    """
    named = {layer.name for layer in report.layers}
    reports = []
    for old in attached(model):
        layers = [layer for layer in old.layers if layer.name not in named]
        if len(layers) == len(old.layers):
            reports.append(old)
        elif layers:
            kept = sum(x.params_after for x in layers) / sum(x.params_before for x in layers)
            reports.append(replace(old, layers=layers, kept=kept))
    object.__setattr__(model, "_structmat_reports", [*reports, report])


def attached(model: nn.Module) -> list[CompressionReport]:
    """The reports of every compression of the model, oldest first."""
    return list(getattr(model, "_structmat_reports", []))
