# SPDX-License-Identifier: Apache-2.0
"""The canonical Monarch factors W1 (K, J, R, I) and W2 (J, L, K, R) and layouts published before.

All are differentiable and return views where the strides allow, which the operators read as they
are.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops.arguments import check_dimensions


def from_blockdiag_butterfly(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """The canonical factors of a Monarch matrix in the layout of its authors, as views.

    Theirs is, for ``w1 (k, q, p)`` and ``w2 (l, s, r)`` with ``k q = l r``: ``k`` blocks of ``p``
    inputs and ``q`` hidden units; hidden unit ``h`` is unit ``h // l`` of output block ``h % l``;
    output ``i`` of block ``j`` is column ``i l + j``. Hence the result goes with
    ``monarch_linear(..., output="interleaved")``. Here ``K = k``, ``J = l``, ``R = q / l``,
    ``I = p``, ``L = s``.

    Where ``l`` does not divide ``q`` the blocks of the matrix differ in rank and there are no
    canonical factors; :func:`structmat.kronecker_sparse.from_blockdiag_butterfly` takes any shape,
    and :func:`structmat.ops.kronecker_sparse_linear` runs it on the same kernels.

    Args:
        w1: ``(k, q, p)``.
        w2: ``(l, s, r)``.

    Returns:
        ``W1 (K, J, R, I)`` and ``W2 (J, L, K, R)``.

    Raises:
        TypeError: a factor is no dense tensor, or their dtypes differ.
        ValueError: the shapes do not chain, or ``l`` does not divide ``q``.

    Source: ``blockdiag_butterfly_multiply`` of github.com/HazyResearch/fly.

    Example:
        >>> import torch, structmat as sm
        >>> w1, w2 = torch.randn(4, 6, 5), torch.randn(3, 7, 8)
        >>> W1, W2 = sm.monarch.from_blockdiag_butterfly(w1, w2)
        >>> W1.shape, W2.shape, W1.data_ptr() == w1.data_ptr()
        (torch.Size([4, 3, 2, 5]), torch.Size([3, 7, 4, 2]), True)
        >>> sm.ops.monarch_linear(torch.randn(2, 20), W1, W2, output="interleaved").shape
        torch.Size([2, 21])
    """
    op = "from_blockdiag_butterfly"
    check_chain(op, w1, w2)
    k, q, _ = w1.shape
    blocks = w2.shape[0]
    if blocks == 0 or q % blocks != 0:
        raise ValueError(
            f"{op}: {blocks} output blocks of w2 {tuple(w2.shape)} do not divide the {q} hidden "
            f"units of a block of w1 {tuple(w1.shape)}; "
            "structmat.kronecker_sparse.from_blockdiag_butterfly takes this shape"
        )
    rank = q // blocks
    return w1.unflatten(1, (rank, blocks)).transpose(1, 2), w2.unflatten(2, (k, rank))


def check_chain(op: str, w1: Tensor, w2: Tensor) -> None:
    check_alike(op, {"w1": w1, "w2": w2}, 3)
    if w1.shape[0] * w1.shape[1] != w2.shape[0] * w2.shape[2]:
        raise ValueError(
            f"{op}: w1 is {tuple(w1.shape)} and w2 is {tuple(w2.shape)}, wanted (k, q, p) and "
            "(l, s, r) with k q = l r"
        )


def to_blockdiag_butterfly(W1: Tensor, W2: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`from_blockdiag_butterfly`: the layout of the authors of Monarch.

    The same matrix as ``monarch_linear(..., output="interleaved")``; that of a blocked output has
    its rows in another order.

    Args:
        W1: ``(K, J, R, I)``.
        W2: ``(J, L, K, R)``.

    Returns:
        ``w1 (K, R J, I)`` and ``w2 (J, L, K R)``.

    Raises:
        TypeError: a factor is no dense tensor, or their dtypes differ.
        ValueError: the shapes do not fit together.

    Example:
        >>> import torch, structmat as sm
        >>> W1, W2 = torch.randn(4, 3, 2, 5), torch.randn(3, 7, 4, 2)
        >>> w1, w2 = sm.monarch.to_blockdiag_butterfly(W1, W2)
        >>> w1.shape, w2.shape
        (torch.Size([4, 6, 5]), torch.Size([3, 7, 8]))
    """
    check_factors("to_blockdiag_butterfly", W1, W2)
    return W1.transpose(1, 2).flatten(1, 2), W2.flatten(2, 3)


def from_btt(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The canonical factors of a block tensor train with two cores, as views.

    For inputs ``m1 m0``, outputs ``n0 n1`` and rank ``r``; hidden units ``(n0, r)`` of each block,
    the rank fastest, and blocked outputs: ``K = m1``, ``I = m0``, ``J = n0``, ``L = n1``,
    ``R = r``.

    Args:
        first: ``(m1, m0, n0 r)``.
        second: ``(n0, m1 r, n1)``.

    Returns:
        ``W1 (K, J, R, I)`` and ``W2 (J, L, K, R)``.

    Raises:
        TypeError: a factor is no dense tensor, or their dtypes differ.
        ValueError: the shapes do not chain.

    Source: ``btt_mvm`` of github.com/shikaiqiu/compute-better-spent; Qiu et al., Compute Better
    Spent: Replacing Dense Layers with Structured Matrices, 2024.

    Example:
        >>> import torch, structmat as sm
        >>> W1, W2 = sm.monarch.from_btt(torch.randn(4, 5, 6), torch.randn(3, 8, 7))
        >>> W1.shape, W2.shape
        (torch.Size([4, 3, 2, 5]), torch.Size([3, 7, 4, 2]))
    """
    op = "from_btt"
    check_alike(op, {"first": first, "second": second}, 3)
    (K, _, jr), (J, kr, _) = first.shape, second.shape
    if K == 0 or J == 0 or jr % J or kr % K or jr // J != kr // K:
        raise ValueError(
            f"{op}: first is {tuple(first.shape)} and second is {tuple(second.shape)}, wanted "
            "(m1, m0, n0 r) and (n0, m1 r, n1)"
        )
    R = jr // J
    return (
        first.unflatten(2, (J, R)).permute(0, 2, 3, 1),
        second.unflatten(1, (K, R)).permute(0, 3, 1, 2),
    )


def to_btt(W1: Tensor, W2: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`from_btt`: the two cores of a block tensor train.

    Args:
        W1: ``(K, J, R, I)``.
        W2: ``(J, L, K, R)``.

    Returns:
        ``(K, I, J R)`` and ``(J, K R, L)``.

    Raises:
        TypeError: a factor is no dense tensor, or their dtypes differ.
        ValueError: the shapes do not fit together.

    Example:
        >>> import torch, structmat as sm
        >>> first, second = sm.monarch.to_btt(torch.randn(4, 3, 2, 5), torch.randn(3, 7, 4, 2))
        >>> first.shape, second.shape
        (torch.Size([4, 5, 6]), torch.Size([3, 8, 7]))
    """
    check_factors("to_btt", W1, W2)
    return W1.permute(0, 3, 1, 2).flatten(2, 3), W2.permute(0, 2, 3, 1).flatten(1, 2)


def to_dense(W1: Tensor, W2: Tensor, *, output: str = "blocked") -> Tensor:
    """The matrix that the factors stand for.

    ``W[j L + l, k I + i] = sum_r W2[j,l,k,r] W1[k,j,r,i]``; with ``output="interleaved"`` it is row
    ``l J + j``.

    Args:
        W1: ``(K, J, R, I)``.
        W2: ``(J, L, K, R)``.
        output: the order of the rows, as in :func:`structmat.ops.monarch_linear`.

    Returns:
        ``(J L, K I)``.

    Raises:
        TypeError: a factor is no dense tensor, or their dtypes differ.
        ValueError: the shapes do not fit together, or ``output`` is unknown.

    Example:
        >>> import torch, structmat as sm
        >>> W1, W2 = torch.randn(4, 3, 2, 5), torch.randn(3, 7, 4, 2)
        >>> x, W = torch.randn(8, 20), sm.monarch.to_dense(W1, W2)
        >>> torch.allclose(x @ W.T, sm.ops.monarch_linear(x, W1, W2), rtol=1e-4, atol=1e-4)
        True
    """
    op = "to_dense"
    if not isinstance(output, str) or output not in ("blocked", "interleaved"):
        raise ValueError(f"{op}: output is {output!r}, wanted blocked or interleaved")
    check_factors(op, W1, W2)
    K, J, _, I = W1.shape
    L = W2.shape[1]
    order = "jlki" if output == "blocked" else "ljki"
    return torch.einsum(f"jlkr,kjri->{order}", W2, W1).reshape(J * L, K * I)


def check_factors(op: str, W1: Tensor, W2: Tensor) -> None:
    check_alike(op, {"W1": W1, "W2": W2}, 4)
    K, J, R, _ = W1.shape
    if (W2.shape[0], *W2.shape[2:]) != (J, K, R):
        raise ValueError(
            f"{op}: W1 is {tuple(W1.shape)} and W2 is {tuple(W2.shape)}, wanted (K, J, R, I) and "
            "(J, L, K, R)"
        )


def check_alike(op: str, given: dict[str, Any], dimensions: int) -> None:
    """Raises unless all are dense tensors of so many dimensions and one dtype and device."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be dense, got layout {tensor.layout}")
        check_dimensions(op, name, tensor, dimensions)
    first, like = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype != like.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}, {first} {like.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {like.device}")
