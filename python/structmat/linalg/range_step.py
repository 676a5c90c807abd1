# SPDX-License-Identifier: Apache-2.0
"""One step of subspace tracking."""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .orthonormalize import orthonormalize
from .svd import _DTYPES

_PANEL = 1 << 22  # entries of a 16-bit matrix widened at a time


class RangeStep(NamedTuple):
    """What :func:`range_step` returns: bases ``P (m, r)`` and ``Q (n, r)``, and ``B (n, r)``.

    Example:
        >>> import torch, structmat as sm
        >>> step = sm.linalg.range_step(torch.eye(5), torch.eye(5)[:, :2])
        >>> step._fields, tuple(step.P.shape)
        (('P', 'Q', 'B'), (5, 2))
    """

    P: Tensor
    Q: Tensor
    B: Tensor


@overload
def range_step(A: Tensor, Q: Tensor, *, seed: int = 0) -> RangeStep: ...
@overload
def range_step(A: Sequence[Tensor], Q: Sequence[Tensor], *, seed: int = 0) -> list[RangeStep]: ...
def range_step(
    A: Tensor | Sequence[Tensor], Q: Tensor | Sequence[Tensor], *, seed: int = 0
) -> RangeStep | list[RangeStep]:
    """One warm-started step of subspace iteration: what an optimizer that tracks the leading
    singular subspace of its gradients does in place of a decomposition.

    ``P = orth(A Q)``, ``B = A^T P``, ``Q' = orth(B)``, with :func:`orthonormalize`. ``P B^T`` is
    the best approximation of ``A`` with the range of ``P``, ``P^T A = B^T`` the gradient projected
    as in GaLore, ``P`` and ``B`` the factors of Dion; ``Q'`` goes into the next step. Repeated on
    one matrix this is subspace iteration: the angle to the leading ``r`` right singular vectors
    shrinks by ``(sigma_(r+1) / sigma_r)^2`` a step.

    ``A^T (A Q)`` is not formed at once: squares of singular values would leave the range of float32
    below 1e-23 and above 1e19, and directions below ``sqrt(eps) sigma_1`` would be lost.

    Args:
        A: ``(..., m, n)``, float32, float64, bfloat16 or float16, or a list of matrices of any
            shapes.
        Q: ``(..., n, r)`` with ``r <= min(m, n)`` and the same leading dimensions, of A's dtype,
            float32 for 16-bit ``A``; its columns need not be orthonormal. A list for a list.
        seed: of directions that neither ``A Q`` nor ``B`` determines, 0 to 2^63 - 1.

    Returns:
        :class:`RangeStep`, or a list of them: ``P (..., m, r)`` and ``Q (..., n, r)`` orthonormal
        to rounding, ``B (..., n, r)``, all of Q's dtype.

    Raises:
        TypeError: arguments are neither tensors nor lists of tensors, or of other dtypes.
        ValueError: shapes, devices or lengths do not fit together.
        torch.linalg.LinAlgError: ``A`` or ``Q`` contains NaN or Inf, or a product overflows. To
            know it, the GPU is waited for, except in a captured or compiled graph, where the
            result is NaN.
        RuntimeError: an argument requires grad; pass it detached.

    Cost: ``4 m n r + 4 (m + n) r^2`` FLOPs, two reads of ``A``. 16-bit matrices are widened a panel
    at a time. Products are torch's, matrix after matrix.

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 4.4, with a given start;
    Zhao et al., ICML 2024 (GaLore); Ahn et al., arXiv 2504.05295 (Dion).

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.randn(60, 4) @ torch.randn(4, 40)
        >>> P, Q, B = sm.linalg.range_step(A, sm.linalg.gaussian(40, 4))
        >>> torch.allclose(P @ B.T, A, atol=1e-3)
        True
    """
    op = "range_step"
    if isinstance(A, Tensor) or isinstance(Q, Tensor):
        return _step(A, Q, seed, op)
    if not isinstance(A, Sequence) or not isinstance(Q, Sequence):
        raise TypeError(
            f"{op}: A and Q must be tensors or lists of tensors, got {type(A).__name__} and "
            f"{type(Q).__name__}"
        )
    if len(A) != len(Q):
        raise ValueError(f"{op}: A is a list of {len(A)}, Q of {len(Q)}")
    return [_step(a, q, seed, f"{op}: item {i}") for i, (a, q) in enumerate(zip(A, Q, strict=True))]


def _step(A: object, Q: object, seed: int, op: str) -> RangeStep:
    for name, tensor in (("A", A), ("Q", Q)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got layout {tensor.layout}")
        if tensor.dim() < 2:
            raise ValueError(f"{op}: {name} must have at least 2 dimensions, got {tensor.dim()}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(f"{op}: {name} requires grad, but has no gradient here; detach it")
    assert isinstance(A, Tensor)
    assert isinstance(Q, Tensor)
    if A.dtype not in _DTYPES:
        raise TypeError(f"{op}: A is {A.dtype}, wanted one of " + ", ".join(map(str, _DTYPES)))
    wanted = torch.promote_types(A.dtype, torch.float32)
    if Q.dtype != wanted:
        raise TypeError(f"{op}: Q is {Q.dtype}, wanted {wanted} for A of {A.dtype}")
    if A.device != Q.device:
        raise ValueError(f"{op}: Q is on {Q.device}, A on {A.device}")
    rank = Q.shape[-1]
    if A.shape[:-2] != Q.shape[:-2] or A.shape[-1] != Q.shape[-2] or rank > min(A.shape[-2:]):
        raise ValueError(
            f"{op}: A has shape {tuple(A.shape)}, Q {tuple(Q.shape)}, wanted "
            f"{(*A.shape[:-2], A.shape[-1])} and at most {min(A.shape[-2:])} columns"
        )
    with torch.autocast(A.device.type, enabled=False):
        P = orthonormalize(_product(A, Q), seed=seed)
        B = _transposed_product(A, P)
        return RangeStep(P, orthonormalize(B, seed=seed), B)


def _panels(A: Tensor, wide: torch.dtype) -> list[slice]:
    """Rows of A to take at a time: all where no conversion is needed."""
    rows, per_row = A.shape[-2], max(1, A.numel() // max(1, A.shape[-2]))
    step = max(1, rows if A.dtype == wide else _PANEL // per_row)
    return [slice(r, r + step) for r in range(0, max(rows, 1), step)]


def _product(A: Tensor, X: Tensor) -> Tensor:
    parts = [A[..., rows, :].to(X.dtype) @ X for rows in _panels(A, X.dtype)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _transposed_product(A: Tensor, X: Tensor) -> Tensor:
    total = None
    for rows in _panels(A, X.dtype):
        part = A[..., rows, :].to(X.dtype).mT @ X[..., rows, :]
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
