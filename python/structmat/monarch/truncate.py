# SPDX-License-Identifier: Apache-2.0
"""Best approximations of blocks ``M (K, J, L, I)`` by products ``U V`` of given or budgeted ranks.

Block ``(k, j)`` is what input block ``k`` gives to output block ``j``. ``ranks (K, J)``: of a block
only the first columns of ``U (K, J, L, R)`` and rows of ``V (K, J, R, I)`` are not zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .block_svd import block_svd

_SWEEPS = 50
_LEAST_DECREASE = 5e-3


class Truncated(NamedTuple):
    U: Tensor
    V: Tensor
    ranks: Tensor
    error: float  # relative: ||M - U V||_F, or the norm of the outputs' difference


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
    """
    P, _ = _roots(moments, op)
    return _truncate_by_roots(M, ranks, budget, P, op)


def _truncate_by_roots(
    M: Tensor, ranks: Tensor | int, budget: int | None, P: Tensor, op: str
) -> Truncated:
    target = M.double() @ P[:, None]
    parts = _parts(target if M.dtype == torch.float64 else _rounded(target), ranks, budget, op)
    U, V = _balanced(parts.U.double() * (parts.S > 0)[..., None, :], M.double())
    return Truncated(U, V, parts.ranks, _ratio(parts.left, parts.whole))


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
    diagonal = moment.view(K, I, K, I).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    P, inverses = _roots(diagonal, op)
    U, V, ranks, _ = _truncate_by_roots(M, ranks, budget, P, op)
    wanted = M.double().permute(1, 2, 0, 3).reshape(J * L, K * I)
    total = _weighted_square(wanted, moment)
    E = wanted - (U @ V).permute(1, 2, 0, 3).reshape(J * L, K * I)
    left = _weighted_square(E, moment)
    for _ in range(_SWEEPS if float(left) > 0 else 0):
        before = left
        for k in range(K):
            own = slice(k * I, (k + 1) * I)
            C, block = diagonal[k], wanted[:, own]
            G = E @ moment[:, own] - E[:, own] @ C
            target, pulled = block @ P[k] + G @ inverses[k], block + G @ inverses[k] @ inverses[k].T
            parts = _parts(_rounded(target).view(1, J, L, I), ranks[k : k + 1], None, op)
            u, v = _balanced(
                parts.U.double() * (parts.S > 0)[..., None, :], pulled.view(1, J, L, I)
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
    return Truncated(U, V, ranks, float((left / total).sqrt()) if float(total) > 0 else 0.0)


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


def _balanced(U: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
    """``U U^T M`` with columns of U and rows of V of equal lengths; zero columns stay zero."""
    V = U.mT @ M
    length = torch.linalg.vector_norm(V, dim=-1)
    root = length.sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    return U * root[..., None, :], V * inverse[..., None]


def _roots(moments: Tensor, op: str) -> tuple[Tensor, Tensor]:
    """P with ``C = P P^T`` and, on C's range, ``P^-T``."""
    values, Q = torch.linalg.eigh(moments)
    largest = values[..., -1:].clamp_min(0)
    # Rounding, that of sums kept in float32 included.
    if bool((values < -1e-6 * values.shape[-1] * largest).any()):
        raise ValueError(f"{op}: inputs has negative eigenvalues, wanted second moments E[x x^T]")
    positive = values > values.shape[-1] * torch.finfo(values.dtype).eps * largest
    root = torch.where(positive, values, 0).sqrt()
    return Q * root[..., None, :], Q * torch.where(positive, 1 / root, 0)[..., None, :]


def _weighted_square(E: Tensor, moment: Tensor) -> Tensor:
    return ((E @ moment) * E).sum().clamp_min(0)


def _ratio(left: Tensor, whole: Tensor) -> float:
    """Of two norms from those of their parts, without overflow."""
    largest = float(whole.max()) if whole.numel() else 0.0
    if largest == 0:
        return 0.0
    return float((left / largest).norm() / (whole / largest).norm())
