# SPDX-License-Identifier: Apache-2.0
"""Low-rank factors in closed form: ``W' = U V`` minimising ``||L^1/2 (W - W') R^1/2||_F``.

All methods are one thin SVD, ``A = L^1/2 W R^1/2 = Q S P^T``, followed by

    ``U = L^-1/2 Q``,   ``V = Q^T L^1/2 W``

so that ``R`` is never inverted and may be singular. ``U[:, :r] V[:r]`` is optimal for every ``r``:
the pairs come in descending energy. ``svd`` has ``L = R = I``; ``fisher`` a diagonal ``R``;
``whitened`` the second moment of the inputs; ``two_sided`` adds the output's sensitivity ``L``.

A moment lies on the layer's smaller side: ``C = E[x x^T] (n, n)`` where ``n <= m``, else that of
the outputs, ``K = W C W^T (m, m)``, which is all these formulas need. Everything is float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Of the mean eigenvalue, added to the output sensitivity before it is inverted.
_LEFT_DAMPING = 1e-6
_NEGLIGIBLE = 1e-7  # of the largest singular value; the root of a moment's rounding is 1e-8
_RIDGE = 1e-2  # of the mean input energy


class Factors(NamedTuple):
    """``U (m, k)``, ``V (k, n)``, ``k = min(m, n)``, float64, and ``spectrum (k,)`` descending.

    ``dual (m, k)`` gives ``V = dual^T W``. ``sum(spectrum[r:] ** 2)`` is the squared error of rank
    ``r`` in the method's own norm.
    """

    U: Tensor
    V: Tensor
    dual: Tensor
    spectrum: Tensor

    def head(self, rank: int) -> "Factors":
        return Factors(self.U[:, :rank], self.V[:rank], self.dual[:, :rank], self.spectrum)

    def kept(self, rank: int, dtype: torch.dtype) -> "Factors":
        """The first ``rank`` pairs as they will be stored, sharing nothing with these; ``dual``
        in float32 or wider, as ``V`` may be fitted from it again."""
        U, V, dual, spectrum = self.head(rank).balanced()
        exact = torch.promote_types(dtype, torch.float32)
        return Factors(
            U.to(dtype, copy=True),
            V.to(dtype, copy=True),
            dual.to(exact, copy=True),
            spectrum.clone(),
        )

    def balanced(self) -> "Factors":
        """Columns of ``U`` with mean square near one, by powers of two: ``U V`` is the same.

        With orthonormal columns a single inner value can have the energy of all ``m`` outputs,
        ``sqrt(m)`` times their root mean square, which float16 may not hold.
        """
        size = self.U.double().square().mean(0).sqrt()
        scale = torch.exp2(-size.clamp_min(1e-300).log2().round())
        scale = torch.where(size > 0, scale, 1.0).to(self.U)
        return Factors(self.U * scale, self.V / scale[:, None], self.dual / scale, self.spectrum)


def on_input_side(W: Tensor) -> bool:
    """Whether moments of a layer with weight ``(m, n)`` are kept for inputs (else for outputs)."""
    return W.shape[1] <= W.shape[0]


def svd(W: Tensor) -> Factors:
    """Least ``||W - W'||_F``: truncated SVD (Eckart, Young 1936). ``spectrum``: singular values."""
    return _factors(W.double(), W.double())


def fisher(W: Tensor, weights: Tensor) -> Factors:
    """Least ``||(W - W') diag(weights)^1/2||_F`` (FWSVD; Hsu et al. 2022, arXiv:2207.00112).

    ``weights (n,)``: the expected squared gradient of the loss, summed over each input's column.
    """
    return _factors(W.double(), W.double() * weights.double().clamp_min(0).sqrt())


def whitened(W: Tensor, moment: Tensor) -> Factors:
    """Least output error ``E||W x - W' x||^2``: ``W' = U_r U_r^T W``.

    ``U_r``: top eigenvectors of ``W C W^T``. Equal to SVD-LLM's ``U S V^T chol(C)^-1`` (Wang et al.
    2024, arXiv:2403.07378) where that exists, but no inverse is taken and a singular ``C`` is fine.
    """
    return _factors(W.double(), _times_root(W.double(), moment))


def two_sided(W: Tensor, moment: Tensor, left: Tensor) -> Factors:
    """Least ``tr(L E R E^T)``, ``E = W - W'``: the layer's share of the model's output error.

    ``moment``: ``R`` or, on the output side, ``W R W^T``; ``left``: ``L (m, m)``. With both
    estimated from gradients per sequence this is the Kronecker approximation of the Gauss-Newton
    matrix (Gupta et al. 2018, arXiv:1802.09568).
    """
    values, Q = torch.linalg.eigh(left)
    values = values.clamp_min(0)
    values = values + _LEFT_DAMPING * values.mean()
    if not values[-1] > 0:  # the output does not depend on this layer: no preference
        return whitened(W, moment)
    W = W.double()
    root, inverse = (Q * values.sqrt()) @ Q.T, (Q / values.sqrt()) @ Q.T
    return _factors(W, root @ _times_root(W, moment), root, inverse)


def _times_root(W: Tensor, moment: Tensor) -> Tensor:
    """Some ``B`` with ``B B^T = W C W^T``."""
    values, Q = torch.linalg.eigh(moment)
    root = Q * values.clamp_min(0).sqrt()  # rounding leaves tiny negative values
    return W @ root if on_input_side(W) else root


def _factors(
    W: Tensor, A: Tensor, root: Tensor | None = None, inverse: Tensor | None = None
) -> Factors:
    Q, spectrum, _ = torch.linalg.svd(A, full_matrices=False)
    rank = int((spectrum > _NEGLIGIBLE * spectrum[0]).sum())
    if rank < len(spectrum):  # the weighting says nothing about the rest: the weight itself decides
        rest = W if root is None else root @ W
        rest = rest - Q[:, :rank] @ (Q[:, :rank].T @ rest)
        more = torch.linalg.svd(rest, full_matrices=False).U
        Q = torch.linalg.qr(torch.cat([Q[:, :rank], more[:, : len(spectrum) - rank]], 1)).Q
    dual = Q if root is None else root @ Q
    return Factors(Q if inverse is None else inverse @ Q, dual.T @ W, dual, spectrum)


def errors(W: Tensor, factors: Factors, moment: Tensor, left: Tensor | None = None) -> Tensor:
    """``tr(L E_r R E_r^T)`` with ``E_r = W - U[:, :r] V[:r]``, for ``r = 0 .. k``: ``(k + 1,)``.

    Expanded into prefix sums, so all ranks together cost ``O(m k (m + k))``. Exact for any factors
    of the form ``V = dual^T W``, optimal in this norm or not.
    """
    U, V, dual, _ = factors
    W = W.double()
    if on_input_side(W):
        cross = W @ (moment @ V.T)  # W R V^T
        inner = V @ (moment @ V.T)
        total = W @ moment @ W.T if left is not None else (W @ moment * W).sum()
    else:
        cross = moment @ dual
        inner = dual.T @ cross
        total = moment if left is not None else moment.trace()
    total = total if left is None else (left * total).sum()
    return _prefix_errors(total, U, U if left is None else left @ U, cross, inner)


def regressed(
    W: Tensor, moment: Tensor, cross: Tensor, rank: int, *, first: Factors | None = None
) -> Factors:
    """Factors for other inputs ``x'`` than the weight's own ``x``: least ``E||W x - U V x'||^2``.

    ``moment = sum x' x'^T``, ``cross = sum x x'^T``, both ``(n, n)``. The best dense matrix is
    ``W* = W E[x x'^T] E[x' x'^T]^-1``; a ridge of 1 % of the mean input energy pulls it towards
    ``W``, so that directions without data stay as they were. Then ``U`` holds the top eigenvectors
    of ``W* E[x' x'^T] W*^T`` (reduced-rank regression; Izenman 1975) and ``V = U^T W*``;
    given ``first`` factors only their ``V = dual^T W*``.
    """
    W = W.double()
    ridge = _RIDGE * moment.diagonal().mean()
    if ridge > 0:
        pull = W @ (cross - moment)
        damped = moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        W = W + torch.linalg.solve(damped, pull.T).T
    if first is not None:
        return first._replace(U=first.U.double(), V=first.dual.double().T @ W)
    values, Q = torch.linalg.eigh(moment)
    return _factors(W, W @ (Q * values.clamp_min(0).sqrt())).head(rank)


def regression_errors(
    W: Tensor, factors: Factors, moment: Tensor, cross: Tensor, energy: float
) -> Tensor:
    """``sum ||W x - U[:, :r] V[:r] x'||^2`` for ``r = 0 .. k``; ``energy = sum ||W x||^2``."""
    U, V = factors.U, factors.V
    total = torch.tensor(energy, dtype=torch.float64, device=U.device)
    return _prefix_errors(total, U, U, W.double() @ (cross @ V.T), V @ (moment @ V.T))


def _prefix_errors(total: Tensor, U: Tensor, LU: Tensor, cross: Tensor, inner: Tensor) -> Tensor:
    linear = (LU * cross).sum(0).cumsum(0)
    quadratic = ((U.T @ LU) * inner).cumsum(0).cumsum(1).diagonal()
    return torch.cat([total.reshape(1), total - 2 * linear + quadratic]).clamp_min(0)
