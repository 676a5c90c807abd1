# SPDX-License-Identifier: Apache-2.0
"""The norm of second moments, and what the decompositions measure and return in it."""

import math
from typing import Any

import torch
from torch import Tensor

from ..linalg.svd import check_integer
from ..monarch.project import _check_moments, _check_tensor

_BLOCK = 1 << 20  # entries of a block of rows, of which some four are held in float64


class Moments:
    """C, divided by its largest number."""

    def __init__(self, inputs: Tensor | None, W: Tensor, op: str) -> None:
        n = W.shape[1]
        self.full: Tensor | None = None
        self.diagonal = torch.ones(n, dtype=torch.float64, device=W.device)
        self.plain = inputs is None
        if inputs is None:
            return
        _check_tensor("inputs", inputs, op)
        if tuple(inputs.shape) not in ((n,), (n, n)):
            raise ValueError(
                f"{op}: inputs has shape {tuple(inputs.shape)}, wanted {(n, n)}, or {(n,)} for the "
                "diagonal alone"
            )
        if inputs.dim() == 2:
            C = _check_moments(inputs, 1, n, W.device, op)
            slack = n * 8 * torch.finfo(inputs.dtype).eps
            shifted = C.clone()
            shifted.diagonal().add_(slack)
            if int(torch.linalg.cholesky_ex(shifted).info):
                raise ValueError(f"{op}: inputs has negative eigenvalues, wanted second moments")
            self.full, self.diagonal = C, C.diagonal().clamp_min(0)
            return
        if inputs.device != W.device:
            raise ValueError(f"{op}: inputs is on {inputs.device}, W on {W.device}")
        self.diagonal, _ = scaled("inputs", inputs.double(), op)
        if bool((self.diagonal < 0).any()):
            raise ValueError(f"{op}: inputs has negative numbers, wanted second moments")

    def times(self, X: Tensor) -> Tensor:
        """``X C``."""
        if self.full is not None:
            return X @ self.full
        return X if self.plain else X * self.diagonal

    def correlations(self, seen: Tensor) -> Tensor:
        """``D^(-1/2) C D^(-1/2)``, ``D = diag(C)``, of the inputs seen; zero for the others."""
        assert self.full is not None
        inverse = torch.where(seen, self.diagonal.rsqrt(), 0.0)
        return self.full * inverse * inverse[:, None]

    def root(self, X: Tensor) -> Tensor:
        """Some ``Y`` with ``Y Y^T = X C X^T``."""
        if self.full is None:
            return X * self.diagonal.sqrt()
        values, Q = torch.linalg.eigh(self.full)
        return X @ (Q * values.clamp_min(0).sqrt())


def inner(A: Tensor, B: Tensor) -> float:
    return float((A * B).sum().clamp_min(0))  # which keeps NaN


def balanced(P: Tensor, V: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors with the roots of the singular values of ``scale P V``, P orthonormal."""
    Q, s, Z = torch.linalg.svd(V.double(), full_matrices=False)
    root = s.sqrt() * math.sqrt(scale)
    return ((P.double() @ Q) * root).to(dtype).contiguous(), (root[:, None] * Z).to(
        dtype
    ).contiguous()


def energy(W: Tensor, C: Moments) -> float:
    """``||W C^(1/2)||_F^2``."""
    rows = max(1, _BLOCK // W.shape[1])
    return sum(inner(block, C.times(block)) for block in map(Tensor.double, W.split(rows)))


def lost(W: Tensor, U: Tensor, V: Tensor, S: Tensor, scale: float, C: Moments) -> float:
    """``||(W - U V - S) C^(1/2)||_F^2 / scale^2`` of the tensors as they are, in float64."""
    rows = max(1, _BLOCK // W.shape[1])
    V = V.double() / math.sqrt(scale)
    total = 0.0
    for w, u, s in zip(W.detach().split(rows), U.split(rows), S.split(rows), strict=True):
        E = (w.double() - s.double()) / scale - (u.double() / math.sqrt(scale)) @ V
        total += inner(E, C.times(E))
    return total


def relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def check_finite(op: str, dtype: torch.dtype, error: float, *returned: Tensor) -> None:
    if not (math.isfinite(error) and all(bool(t.isfinite().all()) for t in returned)):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{op}: the result overflows {dtype}"
        )


def scaled(name: str, tensor: Tensor, op: str) -> tuple[Tensor, float]:
    """In float64 if it is, else float32, divided by the power of two at its largest number; and
    that."""
    wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).contiguous()
    largest = float(torch.maximum(wide.max(), -wide.min()))
    if not math.isfinite(largest):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{op}: {name} contains NaN or Inf"
        )
    scale = math.ldexp(1.0, min(max(math.frexp(largest)[1] - 1, -1000), 1000)) if largest else 1.0
    return wide / scale, scale


def check_rank(rank: Any, m: int, n: int, op: str) -> None:
    check_integer("rank", rank, op)
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"{op}: rank is {rank}, wanted 0 to {min(m, n)} for ({m}, {n})")
