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
_LONG = 0.7  # at 0.5 steps fail too often; with 1 ill-conditioned blocks keep up to 11 % more error
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
    0.7 of the curvature that the step before met (after Barzilai, Borwein 1988), raised until the
    error falls.
    """
    m, n = W.shape
    now = _Residual(C, whole, W, rank, seed)
    chosen: Tensor | None = None
    losses: list[float] = []
    t, limit = 1.0, 2.0 * n
    for i in range(iterations):
        if i and rank:
            now.turn()
        while True:
            places, gain, curvature = now.look(t, wanted, family)
            if gain >= 0 or (chosen is None and t >= limit):
                chosen, t = places, max(1.0, _LONG * curvature)
                now.step(gain)
                break
            if t >= limit:
                break
            t = max(2 * t, curvature)
        now.check()
        losses.append(min([now.loss, *losses[-1:]]))  # measured anew, it may be more by rounding
        if _done(losses, whole, W.dtype):
            break
    assert chosen is not None
    pattern = SparsePattern._from_chosen(m, n, family, chosen)
    return Found(now.P, now.V, pattern, pattern.gather(now.S), losses)


class _Residual:
    """``E = W - P V - S``, ``F = E C``, ``H = V C`` and ``loss = <E, F>``.

    All in the dtype of W, until the loss is too small for it. The loss follows by what each step
    gains, ``<A - B, (A + B) C>`` from A to B, the rounding of which shrinks with the step, as that
    of ``<E, F>`` does not. Once it has fallen to 1/16 all are computed again, in float64.

    Matrices of the size of W are written to where they are: new memory costs as much as a product.
    """

    def __init__(self, C: Tensor, whole: float, W: Tensor, rank: int, seed: int) -> None:
        self.exact, self.W, self.C = C, W, C.to(W.dtype)
        self.small = _SMALL * max(whole, _squares(W))  # which C may all but cancel
        self.P = _start(W @ self.C, W, rank, seed)
        self.V, self.S = self.P.T @ W, torch.zeros_like(W)
        self.work: list[Tensor] = []
        self.measure()

    def check(self) -> None:
        if self.loss < self.measured / 16:
            self.measure()

    def measure(self) -> None:
        self.work.clear()  # room for matrices of float64
        E = torch.addmm(self.W.double() - self.S, self.P.double(), self.V.double(), alpha=-1)
        F = E @ self.exact
        self.loss = self.measured = inner(E, F)
        if self.loss < self.small:
            self.W, self.P, self.V, self.S = (X.double() for X in (self.W, self.P, self.V, self.S))
            self.C = self.exact
        self.E, self.F, self.H = E.to(self.W.dtype), F.to(self.W.dtype), self.V @ self.C
        del E, F
        self.work = [torch.empty_like(self.E) for _ in range(3)]

    def turn(self) -> None:
        """P by a sweep of subspace iteration, and the best V for it."""
        A, B, D = self.work
        X = torch.sub(self.W, self.S, out=A)
        G = torch.addmm(self.F, self.P, self.H, out=B)  # X C
        P = orthonormalize(G @ (X.T @ self.P))
        V, H = P.T @ X, P.T @ G
        E, F = X.addmm_(P, V, alpha=-1), G.addmm_(P, H, alpha=-1)
        change = torch.sub(self.E, E, out=D)
        gain = _dot(change, self.F) + _dot(change, F)
        if gain >= 0:
            self.P, self.V, self.H, self.loss = P, V, H, self.loss - gain
            self.work = [self.E, self.F, D]
            self.E, self.F = E, F

    def look(self, t: float, wanted: int, family: str) -> tuple[Tensor, float, float]:
        """Where S would be after a step of ``1 / t``, what that would gain, and its curvature."""
        change, image, scratch = self.work
        Z = torch.add(self.S, self.F, alpha=1 / t, out=change)
        places = best(torch.mul(Z, Z, out=scratch), wanted, family)
        Z.mul_(covered(places, len(Z), Z.shape[1], family)).sub_(self.S)
        torch.mm(change, self.C, out=image)
        bend, length = _dot(change, image), _squares(change)
        return places, 2 * _dot(change, self.F) - bend, bend / length if length else 0.0

    def step(self, gain: float) -> None:
        """The one looked at last."""
        change, image, _ = self.work
        self.S += change
        self.E -= change
        self.F -= image
        self.loss -= gain


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
