# SPDX-License-Identifier: Apache-2.0
"""``W ~ P V + S`` by turns: P and V for the S before, then S, on ``wanted`` places of a family."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import gaussian, orthonormalize
from ..sparse_pattern import SparsePattern
from ..sparse_pattern.selection import best, covered
from .moments import inner

_SWEEPS = 6  # of subspace iteration before the first support is chosen
_STALLED = 1e-4  # of the squared error: an iteration that takes less is the last
_SMALL = 2.0**-20  # of the squared norm: an error that float32 has no digits for
_EXACT = 4.0  # roundings of W: nothing but these is left


class Found(NamedTuple):
    """P orthonormal, ``values`` on the support, and the squared error after each iteration."""

    P: Tensor
    V: Tensor
    pattern: SparsePattern
    values: Tensor
    losses: list[float]


def nearest(W: Tensor, rank: int, wanted: int, family: str, iterations: int, seed: int) -> Found:
    """In the Frobenius norm, where each step is a minimum: of V for P, of P for V, of V
    again, and of S. ``8 m n r`` FLOPs an iteration, and all in the dtype of W.

    ``E = W - P V - S`` is computed entry by entry, so that its norm suffers no cancellation, and
    ``W - S = E + P V``, which the next P and V need, is not formed.
    """
    m, n = W.shape
    whole = _squares(W)
    P = _start(W, W, rank, seed)
    V = P.T @ W
    E = torch.addmm(W, P, V, alpha=-1)
    scores = torch.empty_like(W)
    losses: list[float] = []
    while True:
        chosen = best(torch.mul(E, E, out=scores), wanted, family)
        E.masked_fill_(covered(chosen, m, n, family), 0)
        loss = _squares(E)
        if losses and loss > losses[-1]:  # by rounding
            break
        losses.append(loss)
        kept = P, V, chosen
        if rank == 0 or len(losses) == iterations or _done(losses, whole, W.dtype):
            break
        V_old = V + P.T @ E
        P_new = orthonormalize(E @ V_old.T + P @ (V @ V_old.T))
        V = P_new.T @ E + (P_new.T @ P) @ V
        P = P_new
        torch.addmm(W, P, V, alpha=-1, out=E)
    P, V, chosen = kept
    pattern = SparsePattern._from_chosen(m, n, family, chosen)
    return Found(P, V, pattern, pattern.gather(torch.addmm(W, P, V, alpha=-1, out=E)), losses)


def nearest_in(
    C: Tensor,
    whole: float,
    W: Tensor,
    rank: int,
    wanted: int,
    family: str,
    iterations: int,
    seed: int,
) -> Found:
    """In the norm of correlations of inputs, ``||(W - P V - S) C^(1/2)||_F``, with ``diag(C) = 1``.

    S is a majorisation step: the largest entries of ``S + E C / t``, ``E = W - P V - S``. ``t`` is
    the curvature that the step before met (Barzilai, Borwein 1988), raised until the error falls.

    Steps are taken in the dtype of W, until the error is too small for it. It is followed by what
    each gains, ``<A - B, (A + B) C>`` from A to B, the rounding of which shrinks with the step, as
    that of ``<E, E C>`` does not. Once it has fallen to 1/16 it is measured again, in float64.
    """
    (m, n), dtype = W.shape, W.dtype
    near = C.to(dtype)
    P = _start(W @ near, W, rank, seed)
    V, S = P.T @ W, torch.zeros_like(W)
    W, near, P, V, S, E, F, loss = _measured(C, whole, W, P, V, S)  # F = E C
    measured = loss
    chosen: Tensor | None = None
    losses: list[float] = []
    t, limit = 1.0, 2.0 * n
    for i in range(iterations):
        if i and rank:
            X, G = W - S, F + P @ (V @ near)  # G = X C
            P_new = orthonormalize(G @ (X.T @ P))
            V_new = P_new.T @ X
            E_new = torch.addmm(X, P_new, V_new, alpha=-1)
            F_new = torch.addmm(G, P_new, P_new.T @ G, alpha=-1)
            gain = _dot(E - E_new, F + F_new)
            if gain >= 0:
                P, V, E, F, loss = P_new, V_new, E_new, F_new, loss - gain
        while True:
            Z = torch.add(S, F, alpha=1 / t)
            places = best(Z.square(), wanted, family)
            step = Z.mul_(covered(places, m, n, family)).sub_(S)
            image = step @ near
            bend, length = _dot(step, image), _squares(step)
            gain = 2 * _dot(step, F) - bend
            curvature = bend / length if length else 0.0
            if gain >= 0 or (chosen is None and t >= limit):
                chosen, loss, t = places, loss - gain, max(1.0, curvature)
                S, E, F = S.add_(step), E.sub_(step), F.sub_(image)
                break
            if t >= limit:
                break
            t = max(2 * t, curvature)
        if loss < measured / 16:
            W, near, P, V, S, E, F, loss = _measured(C, whole, W, P, V, S)
            measured = loss
        losses.append(min([loss, *losses[-1:]]))  # measured, it may be more by rounding
        if _done(losses, whole, dtype):
            break
    assert chosen is not None
    pattern = SparsePattern._from_chosen(m, n, family, chosen)
    return Found(P, V, pattern, pattern.gather(S), losses)


def _measured(
    C: Tensor, whole: float, W: Tensor, P: Tensor, V: Tensor, S: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """``W, C, P, V, S``, ``E = W - P V - S``, ``E C`` and ``<E, E C>``, computed in float64: tensors
    in the dtype of W or, where that does not resolve the error, in float64."""
    E = torch.addmm(W.double() - S, P.double(), V.double(), alpha=-1)
    F = E @ C
    loss = inner(E, F)
    dtype = torch.float64 if loss < _SMALL * whole else W.dtype
    W, C, P, V, S, E, F = (X.to(dtype) for X in (W, C, P, V, S, E, F))
    return W, C, P, V, S, E, F, loss


def _start(G: Tensor, X: Tensor, rank: int, seed: int) -> Tensor:
    """The leading left singular vectors of ``X C^(1/2)``, ``G = X C``, roughly."""
    P = gaussian(X.shape[0], rank, seed=seed, dtype=X.dtype, device=X.device)
    for _ in range(_SWEEPS if rank else 0):
        P = orthonormalize(G @ (X.T @ P))
    return P


def _squares(E: Tensor) -> float:
    """``||E||_F^2``, rows summed up in float64."""
    return float(torch.linalg.vector_norm(E, dim=1).double().square().sum())


def _dot(A: Tensor, B: Tensor) -> float:
    """``<A, B>``, rows summed up in float64."""
    return float((A * B).sum(1).double().sum())


def _done(losses: list[float], whole: float, dtype: torch.dtype) -> bool:
    loss = losses[-1]
    if loss <= (_EXACT * torch.finfo(dtype).eps) ** 2 * whole:
        return True
    return len(losses) > 1 and losses[-2] - loss <= _STALLED * losses[-2]
