# SPDX-License-Identifier: Apache-2.0
"""Chains of Kronecker-sparse factors: what other structures are as such, and dense matrices.

A factor is a tensor ``(a, b, c, d)``, a chain a list of them, the first applied first, as
:func:`structmat.ops.kronecker_sparse_linear` takes it. Conversions are exact and differentiable;
they return views, which the operator reads as they are, unless they say otherwise.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .monarch.conversions import check_alike, check_chain

__all__ = [
    "from_blast",
    "from_block_diagonal",
    "from_blockdiag_butterfly",
    "from_btt",
    "from_butterfly",
    "from_kronecker",
    "from_low_rank",
    "to_dense",
]


def to_dense(factors: Sequence[Tensor]) -> Tensor:
    """The matrix ``(m, n)`` that a chain stands for, the last factor leftmost.

    Args:
        factors: ``(a, b, c, d)`` each, the first applied first.

    Returns:
        ``(m, n)`` for the ``n = a c d`` inputs of the first and the ``m = a b d`` outputs of the
        last factor.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: there is no factor, or sizes do not chain.

    Example:
        >>> import torch, structmat as sm
        >>> A = torch.ones(2, 1, 3, 1)
        >>> sm.kronecker_sparse.to_dense([A])
        tensor([[1., 1., 1., 0., 0., 0.],
                [0., 0., 0., 1., 1., 1.]])
    """
    op = "to_dense"
    check_alike(op, _named(op, "factors", factors), 4)
    a, _, c, d = factors[0].shape
    n = a * c * d
    dense = torch.eye(n, dtype=factors[0].dtype, device=factors[0].device)
    for i, W in enumerate(factors):
        a, b, c, d = W.shape
        if len(dense) != a * c * d:
            raise ValueError(
                f"{op}: factors[{i - 1}] {tuple(factors[i - 1].shape)} gives {len(dense)} columns, "
                f"factors[{i}] {tuple(W.shape)} takes a c d = {a * c * d}"
            )
        dense = torch.einsum("abcd,acdn->abdn", W, dense.reshape(a, c, d, n)).reshape(a * b * d, n)
    return dense


def from_low_rank(U: Tensor, V: Tensor) -> list[Tensor]:
    """``W = U V`` as the chain ``(1, r, n, 1), (1, m, r, 1)``.

    Args:
        U: ``(m, r)``.
        V: ``(r, n)``.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: the shapes do not chain.

    Example:
        >>> import torch, structmat as sm
        >>> [f.shape for f in sm.kronecker_sparse.from_low_rank(torch.ones(4, 2), torch.ones(2, 3))]
        [torch.Size([1, 2, 3, 1]), torch.Size([1, 4, 2, 1])]
    """
    op = "from_low_rank"
    check_alike(op, {"U": U, "V": V}, 2)
    if U.shape[1] != V.shape[0]:
        raise ValueError(
            f"{op}: U {tuple(U.shape)} has rank {U.shape[1]}, V {tuple(V.shape)} {V.shape[0]}"
        )
    return [V[None, :, :, None], U[None, :, :, None]]


def from_block_diagonal(W: Tensor) -> list[Tensor]:
    """A block-diagonal matrix of ``blocks`` blocks ``q x p`` as the chain ``(blocks, q, p, 1)``.

    Args:
        W: ``(blocks, q, p)``.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: it has not three dimensions.

    Example:
        >>> import torch, structmat as sm
        >>> sm.kronecker_sparse.from_block_diagonal(torch.ones(4, 2, 3))[0].shape
        torch.Size([4, 2, 3, 1])
    """
    check_alike("from_block_diagonal", {"W": W}, 3)
    return [W.unsqueeze(-1)]


def from_blockdiag_butterfly(w1: Tensor, w2: Tensor) -> list[Tensor]:
    """A Monarch matrix in the layout of its authors as ``(k, q, p, 1), (1, s, r, l)``.

    Any shape with ``k q = l r`` is taken, also where ``l`` does not divide ``q`` and the blocks of
    the matrix differ in rank. It runs as one product on the kernels of
    :func:`structmat.ops.monarch_linear`. The outputs are interleaved, as theirs.

    Args:
        w1: ``(k, q, p)``.
        w2: ``(l, s, r)``.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: the shapes do not chain.

    Source: ``blockdiag_butterfly_multiply`` of github.com/HazyResearch/fly.

    Example:
        >>> import torch, structmat as sm
        >>> w1, w2 = torch.randn(4, 6, 5), torch.randn(8, 2, 3)
        >>> chain = sm.kronecker_sparse.from_blockdiag_butterfly(w1, w2)
        >>> sm.ops.kronecker_sparse_linear(torch.randn(7, 20), chain).shape
        torch.Size([7, 16])
    """
    check_chain("from_blockdiag_butterfly", w1, w2)
    return [w1.unsqueeze(-1), w2.permute(1, 2, 0).unsqueeze(0)]


def from_kronecker(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The Kronecker product ``A_1 (x) A_2 (x) ...`` as a chain with one factor for each.

    ``A_t (m_t, n_t)`` becomes the factor ``(n_1 .. n_{t-1}, m_t, n_t, m_{t+1} ..)``, the same
    numbers in every block by strides of zero. The last is applied first. Gradients add up over the
    blocks.

    Args:
        matrices: ``A_1, A_2, ...`` as in ``torch.kron(A_1, torch.kron(A_2, ...))``.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: there is none, or one has not two dimensions.

    Example:
        >>> import torch, structmat as sm
        >>> A, B = torch.randn(2, 3), torch.randn(4, 5)
        >>> chain = sm.kronecker_sparse.from_kronecker([A, B])
        >>> [f.shape for f in chain]
        [torch.Size([3, 4, 5, 1]), torch.Size([1, 2, 3, 4])]
        >>> torch.allclose(sm.kronecker_sparse.to_dense(chain), torch.kron(A, B))
        True
    """
    op = "from_kronecker"
    check_alike(op, _named(op, "matrices", matrices), 2)
    chain = []
    for t in reversed(range(len(matrices))):
        before = prod(A.shape[1] for A in matrices[:t])
        after = prod(A.shape[0] for A in matrices[t + 1 :])
        m, n = matrices[t].shape
        chain.append(matrices[t][None, :, :, None].expand(before, m, n, after))
    return chain


def from_butterfly(twiddle: Tensor, *, increasing_stride: bool = True) -> list[Tensor]:
    """A butterfly matrix of radix 2 as a chain ``(n / (2 s), 2, 2, s)``, one factor a level.

    Level ``t`` combines the pairs of entries that are ``s`` apart, ``s = 2^t``, or
    ``s = n / 2^(t+1)`` with ``increasing_stride=False``. Chains are lists: add those of several
    matrices for their product.

    Args:
        twiddle: ``(log2 n, n / 2, 2, 2)``: for each level and pair, in the order of the vector, the
            2 x 2 matrix it is multiplied by.
        increasing_stride: the order of the levels.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: the shape is not that for a power of two.

    Source: ``butterfly_multiply_torch`` of github.com/HazyResearch/butterfly; Dao et al., Learning
    Fast Algorithms for Linear Transforms Using Butterfly Factorizations, 2019.

    Example:
        >>> import torch, structmat as sm
        >>> hadamard = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).expand(2, 2, 2, 2)
        >>> sm.kronecker_sparse.to_dense(sm.kronecker_sparse.from_butterfly(hadamard))
        tensor([[ 1.,  1.,  1.,  1.],
                [ 1., -1.,  1., -1.],
                [ 1.,  1., -1., -1.],
                [ 1., -1., -1.,  1.]])
    """
    op = "from_butterfly"
    check_alike(op, {"twiddle": twiddle}, 4)
    levels = len(twiddle)
    if levels == 0 or tuple(twiddle.shape[1:]) != (2 ** (levels - 1), 2, 2):
        raise ValueError(
            f"{op}: twiddle is {tuple(twiddle.shape)}, wanted (log2 n, n / 2, 2, 2) for some "
            "power of two n"
        )
    strides = [2**t for t in range(levels)]
    if not increasing_stride:
        strides.reverse()
    return [
        level.unflatten(0, (-1, stride)).permute(0, 2, 3, 1)
        for level, stride in zip(twiddle, strides, strict=True)
    ]


def from_btt(cores: Sequence[Tensor]) -> list[Tensor]:
    """A block tensor train of any number of cores as a chain with one factor for each.

    For inputs ``n_0 n_1 ..``, outputs ``m_0 m_1 ..`` and ranks ``r_0 = 1, r_1, .., 1`` core ``t``
    becomes the factor ``(m_0 .. m_{t-1}, m_t r_{t+1}, r_t n_t, n_{t+1} ..)``, a copy unless
    ``r_{t+1}`` is one. For two cores in their other published layout
    :func:`structmat.monarch.from_btt` needs none.

    Args:
        cores: ``(r_{t+1}, r_t, m_0, .., m_{t-1}, m_t, n_t, n_{t+1}, ..)`` each.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: the shapes do not fit together.

    Source: ``BTT`` in ``ops/operators.py`` of github.com/shikaiqiu/compute-better-spent.

    Example:
        >>> import torch, structmat as sm
        >>> cores = [torch.randn(2, 1, 3, 4, 5), torch.randn(1, 2, 3, 6, 5)]
        >>> [f.shape for f in sm.kronecker_sparse.from_btt(cores)]
        [torch.Size([1, 6, 4, 5]), torch.Size([3, 6, 10, 1])]
    """
    op = "from_btt"
    named = _named(op, "cores", cores)
    count = len(cores)
    check_alike(op, named, count + 3)
    m = [core.shape[2 + t] for t, core in enumerate(cores)]
    n = [core.shape[3 + t] for t, core in enumerate(cores)]
    ranks = [1, *(core.shape[1] for core in cores[1:]), 1]
    chain = []
    for t, core in enumerate(cores):
        wanted = (ranks[t + 1], ranks[t], *m[: t + 1], *n[t:])
        if tuple(core.shape) != wanted:
            raise ValueError(
                f"{op}: cores[{t}] is {tuple(core.shape)}, wanted {wanted}, that is (r_{t + 1}, "
                f"r_{t}, m_0, .., m_{t}, n_{t}, ..) after the other cores"
            )
        before, after = prod(m[:t]), prod(n[t + 1 :])
        core = core.reshape(*core.shape[:2], before, m[t], n[t], after).permute(2, 3, 0, 1, 4, 5)
        chain.append(core.reshape(before, m[t] * ranks[t + 1], ranks[t] * n[t], after))
    return chain


def from_blast(B: Tensor, C: Tensor, D: Tensor) -> list[Tensor]:
    """BLAST as the chain ``(b2, r, q, 1), (1, b1, b2, r), (b1, p, r, 1)``.

    Block ``(i, j)`` of the matrix is ``B[i] diag(D[i,j]) C[j]``, ``p x q``.

    Args:
        B: ``(b1, p, r)``.
        C: ``(b2, r, q)``.
        D: ``(b1, b2, r)``; of the published ``(r, b1, b2)`` it is ``permute(1, 2, 0)``.

    Raises:
        TypeError: anything is no dense tensor, or dtypes differ.
        ValueError: the shapes do not fit together.

    Source: Lee et al., BLAST: Block-Level Adaptive Structured Matrices for Efficient Deep Neural
    Network Inference, 2024.

    Example:
        >>> import torch, structmat as sm
        >>> B, C, D = torch.ones(2, 3, 4), torch.ones(5, 4, 6), torch.ones(2, 5, 4)
        >>> [f.shape for f in sm.kronecker_sparse.from_blast(B, C, D)]
        [torch.Size([5, 4, 6, 1]), torch.Size([1, 2, 5, 4]), torch.Size([2, 3, 4, 1])]
    """
    op = "from_blast"
    check_alike(op, {"B": B, "C": C, "D": D}, 3)
    if tuple(D.shape) != (B.shape[0], C.shape[0], B.shape[2]) or C.shape[1] != B.shape[2]:
        raise ValueError(
            f"{op}: B is {tuple(B.shape)}, C is {tuple(C.shape)} and D is {tuple(D.shape)}, wanted "
            "(b1, p, r), (b2, r, q) and (b1, b2, r)"
        )
    return [C.unsqueeze(-1), D.unsqueeze(0), B.unsqueeze(-1)]


def _named(op: str, name: str, given: Any) -> dict[str, Any]:
    """The tensors of a list, by name."""
    if isinstance(given, Tensor) or not hasattr(given, "__getitem__"):
        raise TypeError(f"{op}: {name} must be a list of tensors, got {type(given).__name__}")
    if len(given) == 0:
        raise ValueError(f"{op}: {name} is empty, wanted at least one")
    return {f"{name}[{i}]": tensor for i, tensor in enumerate(given)}
