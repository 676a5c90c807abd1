# SPDX-License-Identifier: Apache-2.0
"""Best approximations of blocks ``M (K, J, L, I)`` by products ``U V`` of given or budgeted ranks.

Block ``(k, j)`` is what input block ``k`` gives to output block ``j``. ``ranks (K, J)``: of a block
only the first columns of ``U (K, J, L, R)`` and rows of ``V (K, J, R, I)`` are not zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .block_svd import block_svd

_SWEEPS = 50
_LEAST_DECREASE = 5e-3
_ROUNDING = 1e-6  # of the largest eigenvalue and for each row: that of sums kept in float32
_NEGATIVE = "inputs has negative eigenvalues, wanted second moments E[x x^T]"
_LEAST_ERROR = 1e-14  # squared: singular vectors in float32 know no better


class Truncated(NamedTuple):
    U: Tensor
    V: Tensor
    ranks: Tensor
    error: float  # relative: ||M - U V||_F, or the norm of the outputs' difference

    def _scaled_back(self, scale: float) -> "Truncated":
        root = scale**0.5
        return self._replace(U=self.U * root, V=self.V * root)


class _Parts(NamedTuple):
    """Singular triplets, zero beyond each block's rank."""

    U: Tensor
    S: Tensor
    Vh: Tensor
    ranks: Tensor
    whole: Tensor  # Frobenius norms (K, J), of the blocks and of what is left out
    left: Tensor


def truncate(M: Tensor, ranks: Tensor | int, budget: int | None, op: str) -> Truncated:
    """The closed form: by Eckart and Young block by block, hence in all (Frobenius norm).

    Args:
        M: blocks.
        ranks: of each block, or one for all.
        budget: instead of ranks, how many singular values are kept in all, the largest ones.
        op: who asks, for messages.
    """
    parts = _parts(M, ranks, budget, op)
    root = parts.S.sqrt()
    return Truncated(
        parts.U * root[..., None, :],
        root[..., None] * parts.Vh,
        parts.ranks,
        _ratio(parts.left, parts.whole),
    )


def truncate_weighted(
    M: Tensor, ranks: Tensor | int, budget: int | None, moments: Tensor, op: str
) -> Truncated:
    """Minimises ``sum ||(M - U V) x||^2`` for inputs ``x`` of second moments ``(K, I, I)``.

    With ``C_k = P P^T`` this is the truncated SVD of ``M P``. Its left vectors ``U`` are kept, and
    ``V = U^T M`` needs no inverse of ``P``; where inputs never go it is the best there is, too.
    Rank that ``M P`` has no use for goes to the rest, ``M - U V``, which no input sees.
    """
    P, _ = _roots(moments, op)
    scaled, scale = _scaled(M)
    return _truncate_by_roots(scaled, ranks, budget, P, M.dtype, op)._scaled_back(scale)


def _truncate_by_roots(
    M: Tensor, ranks: Tensor | int, budget: int | None, P: Tensor, dtype: torch.dtype, op: str
) -> Truncated:
    target = M @ P[:, None]
    if dtype != torch.float64:
        target = _rounded(target)
    U, V, parts = _fitted(target, M, ranks, budget, op)
    return Truncated(U, V, parts.ranks, _ratio(parts.left, parts.whole))


def _fitted(
    target: Tensor, M: Tensor, ranks: Tensor | int, budget: int | None, op: str
) -> tuple[Tensor, Tensor, _Parts]:
    """``U U^T M`` for the left vectors of the target, and of what is left of M its best
    approximation by the rank that the target leaves unused. With the ranks now used."""
    parts = _parts(target, ranks, budget, op)
    eps = torch.finfo(parts.S.dtype).eps
    noise = 2 * eps * parts.S[..., :1]  # vectors are made of rounding errors there
    used = noise < parts.S
    U = parts.U.double() * used[..., None, :]
    V = U.mT @ M
    first = used.sum(-1)
    unused = parts.ranks - first
    more = int(unused.sum()) if budget is None else budget - int(first.sum())
    if more > 0:
        rest = M - U @ V
        others = _parts(rest.to(target.dtype), unused, None if budget is None else more, op)
        width = parts.S.shape[-1]
        if budget is not None:
            least = 4 * eps * torch.linalg.matrix_norm(M)[..., None]
            parts = parts._replace(ranks=first + (least < others.S).sum(-1))
            width = max(1, int(parts.ranks.max()))
        column = torch.arange(width, device=M.device)
        place = (column - first[..., None]).clamp(0, others.S.shape[-1] - 1)
        free = (column >= first[..., None]) & (column < parts.ranks[..., None])
        u = others.U.double().take_along_dim(place[..., None, :], -1) * free[..., None, :]
        grown = width - U.shape[-1]  # columns cut off are zero
        U, V = pad(U, (0, grown)) + u, pad(V, (0, 0, 0, grown)) + u.mT @ rest
    return *_balanced(U, V), parts


def _scaled(M: Tensor) -> tuple[Tensor, float]:
    """In float64, of largest entry one: sums of squares neither overflow nor vanish."""
    largest = float(M.abs().max())
    scale = largest if largest != 0 else 1.0
    return M.double() / scale, scale


def _rounded(target: Tensor) -> Tensor:
    """In float32 and near one: singular vectors to 1e-7 are enough, and take a fraction of the
    time where the values fall off."""
    return (target / target.abs().max().clamp_min(torch.finfo(target.dtype).tiny)).float()


def truncate_full(
    M: Tensor, ranks: Tensor | int, budget: int | None, moment: Tensor, op: str
) -> Truncated:
    """The same for second moments ``C (K I, K I)`` that couple the input blocks: no closed form.

    Starts from the answer for C's diagonal blocks. Then one input block after the other is solved
    for, all others fixed. With ``E = M - U V`` and ``G = sum_{i != k} E_i C_ik`` the sum is, up to
    a constant, ``||E_k P + G P^-T||^2`` for ``C_kk = P P^T``: again a truncated SVD, of
    ``M_k P + G P^-T``, whose minimum is global in both factors. Hence the sum never grows. Ends
    once a sweep over all blocks takes less than 0.5 % of it.
    """
    K, J, L, I = M.shape
    _check_semidefinite(moment, op)
    diagonal = moment.view(K, I, K, I).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    P, inverses = _roots(diagonal, op)
    scaled, scale = _scaled(M)
    U, V, ranks, _ = _truncate_by_roots(scaled, ranks, budget, P, M.dtype, op)
    wanted = scaled.permute(1, 2, 0, 3).reshape(J * L, K * I)
    total = _weighted_square(wanted, moment)
    E = wanted - (U @ V).permute(1, 2, 0, 3).reshape(J * L, K * I)
    left = _weighted_square(E, moment)
    for _ in range(_SWEEPS):
        if not float(left) > _LEAST_ERROR * float(total):
            break
        before = left
        for k in range(K):
            own = slice(k * I, (k + 1) * I)
            C, block = diagonal[k], wanted[:, own]
            G = E @ moment[:, own] - E[:, own] @ C
            target, pulled = block @ P[k] + G @ inverses[k], block + G @ inverses[k] @ inverses[k].T
            shape = (1, J, L, I)
            u, v, _ = _fitted(
                _rounded(target).view(shape), pulled.view(shape), ranks[k : k + 1], None, op
            )
            after = block - (u @ v).view(J * L, I)
            # What E and G make of the sum is all of it that block k has a part in.
            share, least = (((e @ C + 2 * G) * e).sum() for e in (E[:, own], after))
            if not bool(least < share):
                continue  # rounding
            left = left - (share - least)
            E[:, own] = after
            U[k].zero_()[..., : u.shape[-1]] = u[0]
            V[k].zero_()[:, : v.shape[-2]] = v[0]
        if not float(left) < float(before) * (1 - _LEAST_DECREASE):
            break
    left = _weighted_square(E, moment)
    error = float((left / total).sqrt()) if float(total) > 0 else 0.0
    return Truncated(U, V, ranks, error)._scaled_back(scale)


def _parts(M: Tensor, ranks: Tensor | int, budget: int | None, op: str) -> _Parts:
    most = min(M.shape[-2:])
    if budget is not None:
        return _largest(M, budget, op)
    if isinstance(ranks, int):
        U, S, Vh, norms = block_svd(M, ranks, op)
        each = torch.full(M.shape[:2], ranks, device=M.device)
        return _Parts(U, S, Vh, each, norms[..., 0], norms[..., 1])
    U, S, Vh, norms = block_svd(M, max(1, min(most, int(ranks.max()))), op)
    return _cut(U, S, Vh, norms, ranks.clamp(max=most))


def _largest(M: Tensor, budget: int, op: str) -> _Parts:
    """The ``budget`` largest singular values of all blocks.

    Triplets are computed until no block has given all of its own: then no value is missing.
    """
    most = min(M.shape[-2:])
    share = -(-budget // max(1, M.shape[0] * M.shape[1]))
    rank = min(most, max(2 * share, share + 4))
    while True:
        U, S, Vh, norms = block_svd(M, rank, op)
        order = S.flatten().sort(descending=True, stable=True).indices[:budget]
        kept = torch.zeros_like(S.flatten(), dtype=torch.bool)
        kept[order] = True
        ranks = (kept.view_as(S) & (S > 0)).sum(-1)  # of a block the first: S descends
        if rank == most or int(ranks.max()) < rank:
            return _cut(U, S, Vh, norms, ranks)
        rank = min(most, 2 * rank)


def _cut(U: Tensor, S: Tensor, Vh: Tensor, norms: Tensor, ranks: Tensor) -> _Parts:
    rank = max(1, int(ranks.max()))
    kept = torch.arange(S.shape[-1], device=S.device) < ranks[..., None]
    dropped = torch.linalg.vector_norm(S.double() * ~kept, dim=-1)
    left = torch.hypot(norms[..., 1], dropped)
    kept = kept[..., :rank]
    return _Parts(
        U[..., :rank] * kept[..., None, :],
        S[..., :rank] * kept,
        Vh[..., :rank, :] * kept[..., None],
        ranks,
        norms[..., 0],
        left,
    )


def _balanced(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The same product for orthonormal columns of U, or zero ones: with those of U and rows of V of
    equal lengths; zero rows make zero columns."""
    root = torch.linalg.vector_norm(V, dim=-1).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    return U * root[..., None, :], V * inverse[..., None]


def _roots(moments: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """P with ``C = P P^T`` and, on C's range, ``P^-T``."""
    values, Q = torch.linalg.eigh(moments)
    largest = values[..., -1:].clamp_min(0)
    if bool((values < -_ROUNDING * values.shape[-1] * largest).any()):
        raise ValueError(f"{op}: {_NEGATIVE}")
    positive = values > values.shape[-1] * torch.finfo(values.dtype).eps * largest
    root = torch.where(positive, values, 0).sqrt()
    return Q * root[..., None, :], Q * torch.where(positive, 1 / root, 0)[..., None, :]


def _check_semidefinite(moment: Tensor, op: str) -> None:
    """By Cholesky of a slightly larger matrix: ``n^3 / 3`` FLOPs, a tenth of its eigenvalues'."""
    n = len(moment)
    raised = moment.clone()
    raised.diagonal().add_(_ROUNDING * n * raised.diagonal().max().clamp_min(torch.finfo().tiny))
    if bool(torch.linalg.cholesky_ex(raised).info):
        raise ValueError(f"{op}: {_NEGATIVE}")


def _weighted_square(E: Tensor, moment: Tensor) -> Tensor:
    return ((E @ moment) * E).sum().clamp_min(0)


def _ratio(left: Tensor, whole: Tensor) -> float:
    """Of two norms from those of their parts, without overflow."""
    largest = float(whole.max()) if whole.numel() else 0.0
    if largest == 0:
        return 0.0
    return float((left / largest).norm() / (whole / largest).norm())
