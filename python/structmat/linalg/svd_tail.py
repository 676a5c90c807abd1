# SPDX-License-Identifier: Apache-2.0
"""The smallest singular triplets."""

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .orthonormalize import orthonormalize
from .random import gaussian
from .svd import _DTYPES, SVDInfo, SVDResult, check_integer, check_not_meta

_STEPS = 40  # of inverse iteration at most; else the whole R is decomposed
_CHECK = 4  # steps from one look at the residuals to the next: each waits for the device


def svd_tail(A: Tensor, rank: int, *, oversample: int | None = None, seed: int = 0) -> SVDResult:
    """The singular triplets of the smallest singular values, without a full decomposition: what
    MiLoRA, SoMA and MiCA start from, or a null space.

    ``A = Q R`` by Householder reflections, then inverse subspace iteration
    ``W = orth(R^-T X)``, ``X = orth(R^-1 W)`` in float64, until the residuals of the
    wanted triplets are rounding. Where they would not get there soon, as for matrices that are
    singular without a small pivot or whose tail is flat, all of ``R`` is decomposed: the result is
    never an unconverged one. It pays where the wanted values are apart from those before them
    (`docs/linalg.md`).

    Args:
        A: ``(m, n)``, float32, float64, bfloat16 or float16, on the CPU or a CUDA device.
        rank: ``k``, how many, 1 to ``min(m, n)``.
        oversample: directions iterated beyond ``rank``; by default as many as ``rank``, at least 8.
        seed: of the first block, 0 to 2^63 - 1.

    Returns:
        :class:`SVDResult`: ``U (m, k)``, ``S (k,)`` descending, ``Vh (k, n)``, the last ``k``
        triplets of ``torch.linalg.svd(A, full_matrices=False)`` in the same order: the smallest
        singular value is the last. Of A's dtype, float32 for 16-bit ``A``. The entry of largest
        magnitude of each column of ``U`` is positive.

        ``S`` is right to ``(16 + sqrt(n)) eps ||A||_2``, as is that of a full decomposition; a
        value below that is noise, and so are the directions within a cluster closer than that.

        ``.info.error`` is the largest ``||A^T u - s v|| / ||A||_F`` of the triplets within ``R``,
        ``.info.rank`` counts values above ``max(m, n) eps`` times the largest column norm of ``R``,
        ``.info.sweeps`` is the number of steps taken, 0 where all of ``R`` was decomposed.

    Raises:
        TypeError: ``A`` is not a dense tensor of one of the four dtypes.
        ValueError: ``A`` is empty, on meta or has not 2 dimensions; an option is out of range. On
            the CPU the smaller side is at most 20000.
        torch.linalg.LinAlgError: ``A`` contains NaN or Inf.
        RuntimeError: ``A`` requires grad (pass ``A.detach()``), or a CUDA graph is being captured
            or compiled: the number of steps depends on the numbers.

    Cost: for ``m >= n``, ``2 m n^2 - 2/3 n^3`` FLOPs for the QR factorisation, on the CPU by one
    thread of LAPACK's, ``2 n^2 l + 8 n l^2`` in float64 a step, ``l = rank + oversample``, and
    ``4 m n k`` for ``U``, against some ``20 n^3`` of the full decomposition at a much lower rate.
    Memory: a copy of ``A`` and three matrices of ``n x n``, on CUDA the orthogonal factor too. On
    the CPU the same inputs give the same bits for any number of threads.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., 8.2.3 and 8.6; the residual test of
    Parlett, The Symmetric Eigenvalue Problem, 4.5.

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.diag(torch.arange(50.0, 0, -1))
        >>> U, S, Vh = sm.linalg.svd_tail(A, 2)
        >>> torch.allclose(S, torch.tensor([2.0, 1.0]))
        True
    """
    rank, oversample, seed = _check(A, rank, oversample, seed)
    with torch.autocast(A.device.type, enabled=False):
        if A.device.type == "cpu":
            return _in_core(A, rank, oversample, seed)
        return _by_torch(A, rank, oversample, seed)


def _in_core(A: Tensor, rank: int, oversample: int, seed: int) -> SVDResult:
    U, S, Vh, facts = torch.ops.structmat.svd_tail.default(A.detach(), rank, oversample, seed)
    if not float(facts[4]):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            "svd_tail: A contains NaN or Inf, or LAPACK did not converge"
        )
    result = SVDResult(U, S, Vh)
    result.info = SVDInfo(facts)
    return result


def _by_torch(A: Tensor, rank: int, oversample: int, seed: int) -> SVDResult:
    """The same from torch's operations: on CUDA, where the core has no kernels for it."""
    m, n = A.shape
    dtype = torch.promote_types(A.dtype, torch.float32)
    tall = (A if m >= n else A.mT).to(dtype)
    largest = float(tall.abs().amax())
    if not math.isfinite(largest):
        raise torch.linalg.LinAlgError("svd_tail: A contains NaN or Inf")  # type: ignore[attr-defined]
    # A power of two, so that neither reflections nor norms leave the range of the dtype. In two
    # steps: that of a subnormal number has no inverse.
    power = math.frexp(largest)[1] if largest > 0 else 0
    scaled = torch.ldexp(
        torch.ldexp(tall, _integer(-(power // 2), A)), _integer(power // 2 - power, A)
    )
    Q, R = torch.linalg.qr(scaled)
    del scaled
    U, S, V, residual, steps = _tail_of_triangle(R, rank, rank + oversample, seed)
    facts = _facts(R, S, residual, steps, max(m, n))
    left, right = Q @ U.to(dtype), V.to(dtype)
    if m < n:
        left, right = right, left
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    sign[sign == 0] = 1
    S = torch.ldexp(S, _integer(power, A)).to(dtype)
    result = SVDResult(left * sign, S, (right * sign).mT.contiguous())
    result.info = SVDInfo(facts)
    return result


def _integer(value: int, like: Tensor) -> Tensor:
    return torch.tensor(value, device=like.device)


def _tail_of_triangle(
    R: Tensor, rank: int, width: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """U, S, V of the smallest singular values of R, in float64, their residuals and the steps."""
    n = R.shape[0]
    tolerance = (16 + n**0.5) * torch.finfo(R.dtype).eps
    wide = R.double()
    scale = float(wide.norm(dim=0).amax())  # at most ||R||_2
    if 2 * width < n and scale > 0:
        # A zero on the diagonal moves by rounding: no singular value moves by more.
        pivots = wide.diagonal()
        floor = torch.finfo(torch.float64).eps * scale
        safe = wide.clone()
        safe.diagonal().copy_(torch.where(pivots.abs() < floor, floor, pivots))
        X = gaussian(n, width, seed=seed, dtype=torch.float64, device=R.device)
        budget = min(_STEPS, 2 * n // width)
        before = math.inf
        for step in range(1, budget + 1):
            W = torch.linalg.solve_triangular(safe.mT, X, upper=False)
            if not bool(W.isfinite().all()):
                break
            W = orthonormalize(W, seed=seed)
            X = torch.linalg.solve_triangular(safe, W, upper=True)
            if not bool(X.isfinite().all()):
                break
            X = orthonormalize(X, seed=seed)
            if step != 2 and step % _CHECK:
                continue
            # Both bases: left vectors from R X alone would be off by eps ||R|| / s.
            P, S, Vh = torch.linalg.svd(W.mT @ (wide @ X))
            U, S, V = W @ P[:, -rank:], S[-rank:], X @ Vh[-rank:].mT
            residual = torch.maximum(
                (wide.mT @ U - V * S).norm(dim=0).amax(), (wide @ V - U * S).norm(dim=0).amax()
            )
            now = float(residual) / scale
            if now <= tolerance:
                return U, S, V, residual, step
            if step >= _CHECK and _steps_left(before, now, tolerance, step) > budget - step:
                break
            before = now
    U, S, Vh = torch.linalg.svd(R)
    return U[:, -rank:], S[-rank:].double(), Vh[-rank:].mT, wide.new_zeros(()), 0


def _steps_left(before: float, now: float, tolerance: float, step: int) -> float:
    """How many more, at the rate of those since the last look."""
    since = _CHECK if step > _CHECK else _CHECK - 2
    if not now < before:
        return math.inf
    return since * math.log(now / tolerance) / math.log(before / now)


def _facts(R: Tensor, S: Tensor, residual: Tensor, steps: int, longest: int) -> Tensor:
    """error, norm, rank, sweeps, finite, converged: SvdInfo of structmat/svd.h."""
    wide = R.double()
    norm = wide.norm()
    bound = longest * torch.finfo(R.dtype).eps * wide.norm(dim=0).amax()
    error = residual / norm if float(norm) > 0 else norm
    count = (bound < S).sum().double()
    return torch.stack([error, norm, count, S.new_tensor(float(steps)), *S.new_ones(2)])


def _check(A: Any, rank: int, oversample: int | None, seed: int) -> tuple[int, int, int]:
    """Raises for arguments it does not take; rank, the directions beyond it, and seed."""
    op = "svd_tail"
    if not isinstance(A, Tensor):
        raise TypeError(f"{op}: A must be a tensor, got {type(A).__name__}")
    if A.layout != torch.strided:
        raise TypeError(f"{op}: A must be dense, got layout {A.layout}")
    if A.dtype not in _DTYPES:
        raise TypeError(f"{op}: A is {A.dtype}, wanted one of " + ", ".join(map(str, _DTYPES)))
    if A.dim() != 2:
        raise ValueError(f"{op}: A must have 2 dimensions, got {A.dim()}")
    if A.numel() == 0:
        raise ValueError(f"{op}: A is empty, shape {tuple(A.shape)}")
    check_not_meta("A", A.device, op)
    if A.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: A requires grad, but has no gradient here; pass A.detach()")
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(f"{op}: there is no rule for torch.func transforms and forward mode")
    if torch.compiler.is_compiling() or (A.is_cuda and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(
            f"{op}: the number of steps depends on the numbers: no graph can hold it"
        )
    for name, value in (("rank", rank), ("seed", seed), ("oversample", oversample)):
        if value is not None or name != "oversample":
            check_integer(name, value, op)
    if not 1 <= rank <= min(A.shape):
        raise ValueError(
            f"{op}: rank is {rank}, wanted 1 to {min(A.shape)} for A of shape {tuple(A.shape)}"
        )
    if oversample is not None and oversample < 0:
        raise ValueError(f"{op}: oversample is {oversample}, wanted at least 0")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")
    rank = operator.index(rank)
    extra = max(8, rank) if oversample is None else operator.index(oversample)
    return rank, extra, operator.index(seed)
