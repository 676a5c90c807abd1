# SPDX-License-Identifier: Apache-2.0
"""The low-rank repair of a quantised or pruned weight."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..monarch.project import _check_matrix, _check_tensor
from .moments import Moments, balanced, check_finite, check_rank, energy, lost, relative, scaled


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
    check_rank(rank, m, n, op)
    A, scale = scaled("W", W.double(), op)
    B, scale_hat = scaled("W_hat", W_hat.double(), op)
    if scale_hat > scale:
        A, B, scale = A * (scale / scale_hat), B, scale_hat
    else:
        B = B * (scale_hat / scale)
    moments = Moments(inputs, A, op)
    difference = A - B
    P = torch.linalg.svd(moments.root(difference), full_matrices=False).U[:, :rank]
    U, V = balanced(P, P.T @ difference, scale, W.dtype)
    left = lost(W, U, V, W_hat.detach(), scale, moments)
    error = relative(left, energy(A, moments))
    check_finite(op, W.dtype, error, U, V)
    return Compensation(U, V, error)
