# SPDX-License-Identifier: Apache-2.0
"""Sparse plus low-rank approximations of dense matrices."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .linalg import gaussian, orthonormalize
from .linalg.svd import check_integer
from .monarch.project import _check_matrix, _check_moments, _check_tensor
from .sparse_pattern import SparsePattern
from .sparse_pattern.families import wanted_places

__all__ = ["Compensation", "SparseLowRank", "compensate", "decompose"]

_SWEEPS = 6  # of subspace iteration before the first support is chosen
_STALLED = 1e-4  # of the squared error: an iteration that takes less is the last
_EXACT = 1e-28  # of the squared norm: nothing but rounding is left
_BLOCK = 1 << 22  # entries of a block of rows


class SparseLowRank(NamedTuple):
    """``W ~ U V + S``, what :func:`decompose` returns.

    Attributes:
        U, V: ``(m, r)`` and ``(r, n)``, of the dtype of W. Both carry the roots of the singular
            values of their product, which descend.
        pattern: the support of S.
        values: ``(nnz,)``, the entries of S, of the dtype of W.
        error: ``||(W - U V - S) C^(1/2)||_F / ||W C^(1/2)||_F`` of these very tensors, evaluated
            directly in float64.
        errors: the same after each iteration, never increasing, before rounding to the dtype of W.

    Example:
        >>> import torch, structmat as sm
        >>> found = sm.sparse_low_rank.decompose(torch.eye(8), 0, 0.125)
        >>> found.error, found.pattern.nnz, found.errors
        (0.0, 8, [0.0])
    """

    U: Tensor
    V: Tensor
    pattern: SparsePattern
    values: Tensor
    error: float
    errors: list[float]


class Compensation(NamedTuple):
    """What :func:`compensate` returns: ``U (m, r)``, ``V (r, n)`` and the error that is left.

    Example:
        >>> import torch, structmat as sm
        >>> sm.sparse_low_rank.compensate(torch.eye(4), torch.zeros(4, 4), 3).error
        0.5
    """

    U: Tensor
    V: Tensor
    error: float


def decompose(
    W: Tensor,
    rank: int,
    density: float,
    *,
    family: str = "uniform",
    inputs: Tensor | None = None,
    iterations: int = 40,
    seed: int = 0,
) -> SparseLowRank:
    """Approximates a dense matrix by a sparse plus a low-rank one.

    Minimises ``||(W - U V - S) C^(1/2)||_F`` over ``U V`` of rank r and ``S`` on a support of the
    family, with C the second moment of the inputs, by turns:

    - ``S``: the largest entries, or groups of them, of ``S + (W - U V - S) C (t D)^-1``, measured
      in ``D = diag(C)``. Without inputs and for a diagonal C that is, with ``t = 1``, the exact
      minimum. For a full one it is a majorisation step: ``t`` is doubled until the error falls,
      which it does at the latest where ``t D - C`` has no negative eigenvalue.
    - ``U V``: one sweep of subspace iteration from the U before, ``U = orth((W - S) C (W - S)^T
      U)``, then the best V for it, ``U^T (W - S)``, for which C need not be inverted and may be
      singular.

    The error never grows; a step that would is not taken. Iterations end when one takes less than
    0.01 % of the squared error. That is near a stationary point, not always the global optimum,
    which is NP-hard to find.

    Args:
        W: ``(m, n)``, float32, float64, bfloat16 or float16, of any strides, on the CPU or a CUDA
            device. No gradient is recorded.
        rank: 0 to ``min(m, n)``.
        density, family: of the support, as for :meth:`structmat.SparsePattern.random`, with as many
            entries.
        inputs: second moments of the layer's inputs, ``E[x x^T]`` or their sum, ``(n, n)``, or its
            diagonal alone, ``(n,)``: minimises the expected ``||(W - U V - S) x||^2``.
        iterations: at most so many.
        seed: of the start of the subspace iteration.

    Returns:
        :class:`SparseLowRank`, for :func:`structmat.ops.sparse_low_rank_linear`.

    Raises:
        TypeError: W or inputs is no dense tensor of one of these dtypes; rank, iterations or seed
            no integer.
        ValueError: W is not 2-D or has no entries; rank, density, family, iterations or the shape
            or device of inputs is none of the above; inputs is not symmetric, or has negative
            numbers on the diagonal or negative eigenvalues.
        torch.linalg.LinAlgError: NaN or Inf in W or in inputs.

    Cost: ``10 m n r`` FLOPs and one selection among ``m n`` scores an iteration, and ``2 m n^2``
    FLOPs for each ``t`` tried with full moments, all in float64, with about ten matrices of the
    size of W in memory.

    Sources: Zhou, Tao, GoDec (ICML 2011) for the alternation; Zhang, Papyan, OATS (ICLR 2025) for
    the diagonal weighting; Makni et al., HASSLE-free (2025) for the full objective.

    Example:
        >>> import torch, structmat as sm
        >>> S = sm.SparsePattern.random(64, 48, 0.05).scatter(4 * torch.ones(154))
        >>> W = torch.randn(64, 3) @ torch.randn(3, 48) + S
        >>> found = sm.sparse_low_rank.decompose(W, 3, 0.05)
        >>> found.U.shape, found.V.shape, found.pattern.nnz
        (torch.Size([64, 3]), torch.Size([3, 48]), 154)
    """
    op = "sparse_low_rank.decompose"
    m, n = _check_matrix(W, op)
    _check_rank(rank, m, n, op)
    wanted_places(op, density, m, n, family)  # for its errors
    check_integer("iterations", iterations, op)
    check_integer("seed", seed, op)
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}, wanted at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")
    A, scale = _scaled("W", W, op)
    moments = _Moments(inputs, A, op)

    def select(scores: Tensor) -> SparsePattern:
        return SparsePattern.from_scores(scores, density, family=family)

    P, V, pattern, values, losses = _alternate(A, rank, select, moments, iterations, seed)
    U, V = _balanced(P, V, scale, W.dtype)
    values = (values * scale).to(W.dtype)
    whole = _energy(A, moments)
    S = pattern.scatter(values)
    error = _relative(_lost(W, U, V, S, scale, moments), whole)
    return SparseLowRank(U, V, pattern, values, error, [_relative(x, whole) for x in losses])


def compensate(W: Tensor, W_hat: Tensor, rank: int, inputs: Tensor | None = None) -> Compensation:
    """The low-rank matrix that best repairs a quantised or pruned weight.

    Minimises ``||(W - W_hat - U V) C^(1/2)||_F`` in closed form: with ``D = W - W_hat``, U holds
    the leading left singular vectors of ``D C^(1/2)``, and ``V = U^T D``. That is the optimum of
    EoRA without its inverse of ``C^(1/2)``: C may be singular, and nothing is cut off but the
    negative eigenvalues that rounding leaves.

    Args:
        W: ``(m, n)``, as for :func:`decompose`.
        W_hat: ``(m, n)``, what it was replaced by, dense, of any of these dtypes.
        rank: 0 to ``min(m, n)``.
        inputs: as for :func:`decompose`.

    Returns:
        :class:`Compensation` with ``U`` and ``V`` of the dtype of W and ``error``,
        ``||(W - W_hat - U V) C^(1/2)||_F / ||W C^(1/2)||_F`` of these tensors, evaluated directly
        in float64.

    Raises:
        TypeError, ValueError, torch.linalg.LinAlgError: as :func:`decompose`, for W_hat as for W.

    Cost: one thin SVD of an ``m x n`` matrix in float64; full moments take ``2 m n^2`` FLOPs and
    the eigendecomposition of an ``n x n`` matrix more.

    Source: Liu et al., EoRA, arXiv 2410.21271.

    Example:
        >>> import torch, structmat as sm
        >>> W = torch.randn(32, 24)
        >>> W_hat = (4 * W).round() / 4
        >>> repaired = sm.sparse_low_rank.compensate(W, W_hat, 8)
        >>> repaired.error < float((W - W_hat).norm() / W.norm())
        True
    """
    op = "sparse_low_rank.compensate"
    m, n = _check_matrix(W, op)
    _check_tensor("W_hat", W_hat, op)
    if W_hat.shape != W.shape or W_hat.device != W.device:
        raise ValueError(
            f"{op}: W_hat is {tuple(W_hat.shape)} on {W_hat.device}, wanted {(m, n)} on {W.device}"
        )
    _check_rank(rank, m, n, op)
    A, scale = _scaled("W", W, op)
    B, scale_hat = _scaled("W_hat", W_hat, op)
    if scale_hat > scale:
        A, B, scale = A * (scale / scale_hat), B, scale_hat
    else:
        B = B * (scale_hat / scale)
    moments = _Moments(inputs, A, op)
    difference = A - B
    P = torch.linalg.svd(moments.root(difference), full_matrices=False).U[:, :rank]
    U, V = _balanced(P, P.T @ difference, scale, W.dtype)
    lost = _lost(W, U, V, W_hat.detach(), scale, moments)
    return Compensation(U, V, _relative(lost, _energy(A, moments)))


class _Moments:
    """C, divided by its largest number."""

    def __init__(self, inputs: Tensor | None, W: Tensor, op: str) -> None:
        n = W.shape[1]
        self.full: Tensor | None = None
        self.diagonal = W.new_ones(n)
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
            eye = torch.eye(n, dtype=C.dtype, device=C.device)
            if int(torch.linalg.cholesky_ex(C + slack * eye).info):
                raise ValueError(f"{op}: inputs has negative eigenvalues, wanted second moments")
            self.full, self.diagonal = C, C.diagonal().clamp_min(0)
            return
        if inputs.device != W.device:
            raise ValueError(f"{op}: inputs is on {inputs.device}, W on {W.device}")
        self.diagonal, _ = _scaled("inputs", inputs, op)
        if bool((self.diagonal < 0).any()):
            raise ValueError(f"{op}: inputs has negative numbers, wanted second moments")

    def times(self, X: Tensor) -> Tensor:
        """``X C``."""
        if self.full is not None:
            return X @ self.full
        return X if self.plain else X * self.diagonal

    def root(self, X: Tensor) -> Tensor:
        """Some ``Y`` with ``Y Y^T = X C X^T``."""
        if self.full is None:
            return X * self.diagonal.sqrt()
        values, Q = torch.linalg.eigh(self.full)
        return X @ (Q * values.clamp_min(0).sqrt())


def _alternate(
    W: Tensor,
    rank: int,
    select: Callable[[Tensor], SparsePattern],
    C: _Moments,
    iterations: int,
    seed: int,
) -> tuple[Tensor, Tensor, SparsePattern, Tensor, list[float]]:
    """``P``, ``V``, the support, its values and the squared error after each iteration."""
    m, n = W.shape
    d, limit = C.diagonal, 1.0 if C.full is None else 2.0 * n
    seen = d > 0
    inverse = torch.where(seen, 1 / d, 0.0)
    X, G = W, C.times(W)  # X = W - S, G = X C
    P = gaussian(m, rank, seed=seed, dtype=W.dtype, device=W.device)
    for _ in range(_SWEEPS if rank else 0):
        P = orthonormalize(G @ (X.T @ P))
    V, H = P.T @ X, P.T @ G
    E, F = X - P @ V, G - P @ H  # E = W - P V - S, F = E C
    S = torch.zeros_like(W)
    loss, whole = _inner(E, F), _inner(W, G)
    best: tuple[SparsePattern, Tensor] | None = None
    losses: list[float] = []
    t = 1.0
    for _ in range(iterations):
        before = loss
        while True:
            step = E if C.full is None else torch.where(seen, F * (inverse / t), E)
            Z = S + step
            chosen = select(Z.square() if C.plain else Z.square() * d)
            kept = chosen.gather(Z)
            S_new = chosen.scatter(kept)
            E_new = E + S - S_new
            F_new = C.times(E_new)
            found = _inner(E_new, F_new)
            if found <= loss or (best is None and t >= limit):
                best, S, E, F, loss = (chosen, kept), S_new, E_new, F_new, found
                t = max(1.0, t / 2)
                break
            if t >= limit:
                break
            t *= 2
        if rank:
            X, G = W - S, F + P @ C.times(V)
            P_new = orthonormalize(G @ (X.T @ P))
            V_new, H = P_new.T @ X, P_new.T @ G
            E_new, F_new = X - P_new @ V_new, G - P_new @ H
            found = _inner(E_new, F_new)
            if found <= loss:
                P, V, E, F, loss = P_new, V_new, E_new, F_new, found
        losses.append(loss)
        if loss <= _EXACT * whole or before - loss <= _STALLED * before:
            break
    assert best is not None
    return P, V, *best, losses


def _inner(A: Tensor, B: Tensor) -> float:
    return max(0.0, float((A * B).sum()))


def _balanced(P: Tensor, V: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both factors with the roots of the singular values of ``scale P V``, P orthonormal."""
    Q, s, Z = torch.linalg.svd(V, full_matrices=False)
    root = s.sqrt() * math.sqrt(scale)
    return ((P @ Q) * root).to(dtype).contiguous(), (root[:, None] * Z).to(dtype).contiguous()


def _energy(W: Tensor, C: _Moments) -> float:
    """``||W C^(1/2)||_F^2``."""
    rows = max(1, _BLOCK // W.shape[1])
    return sum(_inner(block, C.times(block)) for block in W.split(rows))


def _lost(W: Tensor, U: Tensor, V: Tensor, S: Tensor, scale: float, C: _Moments) -> float:
    """``||(W - U V - S) C^(1/2)||_F^2 / scale^2`` of the tensors as they are, in float64."""
    rows = max(1, _BLOCK // W.shape[1])
    V = V.double() / math.sqrt(scale)
    total = 0.0
    for w, u, s in zip(W.detach().split(rows), U.split(rows), S.split(rows), strict=True):
        E = (w.double() - s.double()) / scale - (u.double() / math.sqrt(scale)) @ V
        total += _inner(E, C.times(E))
    return total


def _relative(lost: float, whole: float) -> float:
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def _scaled(name: str, tensor: Tensor, op: str) -> tuple[Tensor, float]:
    """In float64, divided by the power of two above its largest number, and that."""
    wide = tensor.detach().double()
    largest = float(wide.abs().max())
    if not math.isfinite(largest):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{op}: {name} contains NaN or Inf"
        )
    scale = math.ldexp(1.0, min(max(math.frexp(largest)[1], -1000), 1000)) if largest else 1.0
    return wide / scale, scale


def _check_rank(rank: Any, m: int, n: int, op: str) -> None:
    check_integer("rank", rank, op)
    if not 0 <= rank <= min(m, n):
        raise ValueError(f"{op}: rank is {rank}, wanted 0 to {min(m, n)} for ({m}, {n})")
