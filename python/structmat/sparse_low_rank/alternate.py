# SPDX-License-Identifier: Apache-2.0
"""``W ~ P V + S`` by turns: P and V for the S before, then S, on ``wanted`` places of a family."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import gaussian, orthonormalize
from ..sparse_pattern import SparsePattern
from ..sparse_pattern.selection import best, covered
from .moments import Moments, inner

_SWEEPS = 6  # of subspace iteration before the first support is chosen
_STALLED = 1e-4  # of the squared error: an iteration that takes less is the last
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
    C: Moments, W: Tensor, rank: int, wanted: int, family: str, iterations: int, seed: int
) -> Found:
    """In the norm of full second moments, ``||(W - P V - S) C^(1/2)||_F``, all in float64.

    S is a majorisation step: of ``Z = S + E C (t D)^-1``, ``E = W - P V - S``, ``D = diag(C)``, the
    largest entries in the norm of D. ``t`` is doubled until the error falls.
    """
    m, n = W.shape
    d, limit = C.diagonal, 2.0 * n
    seen = d > 0
    inverse = torch.where(seen, 1 / d, 0.0)
    G = C.times(W)  # X C with X = W - S, as H = P^T X C
    P = _start(G, W, rank, seed)
    V, H = P.T @ W, P.T @ G
    E, F = W - P @ V, G - P @ H  # F = E C
    loss, whole = inner(E, F), inner(W, G)
    S = torch.zeros_like(W)
    chosen: Tensor | None = None
    losses: list[float] = []
    t = 1.0
    for i in range(iterations):
        if i and rank:
            G = F + P @ C.times(V)
            X = W - S
            P_new = orthonormalize(G @ (X.T @ P))
            V_new, H = P_new.T @ X, P_new.T @ G
            E_new, F_new = X - P_new @ V_new, G - P_new @ H
            found = inner(E_new, F_new)
            if found <= loss:
                P, V, E, F, loss = P_new, V_new, E_new, F_new, found
        while True:
            Z = S + torch.where(seen, F * (inverse / t), E)
            places = best(Z.square() * d, wanted, family)
            S_new = Z.mul_(covered(places, m, n, family))
            E_new = E + S - S_new
            F_new = C.times(E_new)
            found = inner(E_new, F_new)
            if found <= loss or (chosen is None and t >= limit):
                chosen, S, E, F, loss = places, S_new, E_new, F_new, found
                t = max(1.0, t / 2)
                break
            if t >= limit:
                break
            t *= 2
        losses.append(loss)
        if _done(losses, whole, W.dtype):
            break
    assert chosen is not None
    pattern = SparsePattern._from_chosen(m, n, family, chosen)
    return Found(P, V, pattern, pattern.gather(S), losses)


def _start(G: Tensor, X: Tensor, rank: int, seed: int) -> Tensor:
    """The leading left singular vectors of ``X C^(1/2)``, ``G = X C``, roughly."""
    P = gaussian(X.shape[0], rank, seed=seed, dtype=X.dtype, device=X.device)
    for _ in range(_SWEEPS if rank else 0):
        P = orthonormalize(G @ (X.T @ P))
    return P


def _squares(E: Tensor) -> float:
    """``||E||_F^2``, rows summed up in float64."""
    return float(torch.linalg.vector_norm(E, dim=1).double().square().sum())


def _done(losses: list[float], whole: float, dtype: torch.dtype) -> bool:
    loss = losses[-1]
    if loss <= (_EXACT * torch.finfo(dtype).eps) ** 2 * whole:
        return True
    return len(losses) > 1 and losses[-2] - loss <= _STALLED * losses[-2]
