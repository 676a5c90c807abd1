# SPDX-License-Identifier: Apache-2.0
"""One step of subspace tracking."""

from collections.abc import Sequence
from typing import NamedTuple, overload

import torch
from torch import Tensor

from .svd import _DTYPES, check_integer, check_not_meta

_OP = "range_step"


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
        ValueError: shapes, devices or lengths do not fit together; tensors are on meta.
        torch.linalg.LinAlgError: ``A`` or ``Q`` contains NaN or Inf, or a product overflows. To
            know it, the GPU is waited for, except in a captured or compiled graph, where the
            result is NaN.
        RuntimeError: an argument requires grad; pass it detached.

    Cost: ``4 m n r + 4 (m + n) r^2`` FLOPs, two reads of ``A`` where it lies, whatever its strides;
    16-bit matrices are widened a panel at a time. On the CPU the matrices of a list or a batch run
    side by side, one thread each, but for those too large to share the threads evenly; on CUDA one
    after the other. The same inputs give the same bits for any number of threads, in a list or
    alone.

    Source: Halko, Martinsson, Tropp, SIAM Review 53 (2011), algorithm 4.4, with a given start;
    Zhao et al., ICML 2024 (GaLore); Ahn et al., arXiv 2504.05295 (Dion).

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.randn(60, 4) @ torch.randn(4, 40)
        >>> P, Q, B = sm.linalg.range_step(A, sm.linalg.gaussian(40, 4))
        >>> torch.allclose(P @ B.T, A, atol=1e-3)
        True
    """
    if isinstance(A, Tensor) or isinstance(Q, Tensor):
        _check(A, Q, _OP)
        return _steps([A], [Q], seed)[0]  # type: ignore[list-item]
    if not isinstance(A, Sequence) or not isinstance(Q, Sequence):
        raise TypeError(
            f"{_OP}: A and Q must be tensors or lists of tensors, got {type(A).__name__} and "
            f"{type(Q).__name__}"
        )
    if len(A) != len(Q):
        raise ValueError(f"{_OP}: A is a list of {len(A)}, Q of {len(Q)}")
    for i, (a, q) in enumerate(zip(A, Q, strict=True)):
        _check(a, q, f"{_OP}: item {i}")
        if a.device != A[0].device:
            raise ValueError(f"{_OP}: item {i} is on {a.device}, item 0 on {A[0].device}")
    return _steps(list(A), list(Q), seed) if A else []


def _steps(A: list[Tensor], Q: list[Tensor], seed: int) -> list[RangeStep]:
    check_integer("seed", seed, _OP)
    if not 0 <= seed < 2**63:
        raise ValueError(f"{_OP}: seed is {seed}, wanted 0 to 2^63 - 1")
    for i, a in enumerate(A):
        check_not_meta("A" if len(A) == 1 else f"A[{i}]", a.device, _OP)
    A, Q = ([t.detach() for t in tensors] for tensors in (A, Q))
    P, after, B, finite = torch.ops.structmat.range_step.default(A, Q, seed)
    in_graph = torch.compiler.is_compiling() or (
        A[0].is_cuda and torch.cuda.is_current_stream_capturing()
    )
    if not in_graph and not bool(finite.all()):
        first = int((finite == 0).nonzero()[0])
        sizes = torch.tensor([a.shape[:-2].numel() for a in A])
        item = int((sizes.cumsum(0) <= first).sum())
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{_OP}: A or Q contains NaN or Inf, or a product overflows"
            + (f", in item {item}" if len(A) > 1 else "")
        )
    return [RangeStep(*parts) for parts in zip(P, after, B, strict=True)]


def _check(A: object, Q: object, op: str) -> None:
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


@torch.library.register_fake("structmat::range_step")
def _(
    A: list[Tensor], Q: list[Tensor], seed: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    for a, q in zip(A, Q, strict=True):
        _check(a, q, _OP)
    P = [q.new_empty((*a.shape[:-1], q.shape[-1])) for a, q in zip(A, Q, strict=True)]
    after, B = ([q.new_empty(q.shape) for q in Q] for _ in range(2))
    count = sum(a.shape[:-2].numel() for a in A)
    return P, after, B, A[0].new_empty((count,), dtype=torch.float64)
