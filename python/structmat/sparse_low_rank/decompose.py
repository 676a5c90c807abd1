# SPDX-License-Identifier: Apache-2.0
"""Dense matrices as sparse plus low rank."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.svd import check_integer
from ..monarch.project import _check_matrix
from ..sparse_pattern import SparsePattern
from ..sparse_pattern.families import wanted_places
from .alternate import Found, nearest, nearest_in
from .moments import Moments, balanced, check_finite, check_rank, energy, lost, relative, scaled


class SparseLowRank(NamedTuple):
    """``W ~ U V + S``, what :func:`decompose` returns.

    Attributes:
        U, V: ``(m, r)`` and ``(r, n)``, of the dtype of W. Both carry the roots of the singular
            values of their product, which descend.
        pattern: the support of S.
        values: ``(nnz,)``, the entries of S, of the dtype of W.
        error: ``||(W - U V - S) C^(1/2)||_F / ||W C^(1/2)||_F`` of these very tensors, evaluated
            directly in float64.
        errors: the same after each iteration, never increasing, before rounding to the dtype of W;
            with full moments followed by what the steps gain.

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

    - ``U V``: at first the truncated SVD, roughly; later one sweep of subspace iteration from the U
      before, ``P = orth((W - S) C (W - S)^T U)``, then the best V for it, ``P^T (W - S)``, for
      which C need not be inverted and may be singular.
    - ``S``: the largest entries, or groups of them, of ``S + (W - U V - S) C (t D)^-1``, measured
      in ``D = diag(C)``. Without inputs and for a diagonal C that is, with ``t = 1``, the exact
      minimum. For a full one it is a majorisation step: ``t`` is 0.7 of the curvature that the
      step before met, raised until the error falls, which it does at the latest where ``t D - C``
      has no negative eigenvalue.

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
        torch.linalg.LinAlgError: NaN or Inf in W or in inputs, or a result that overflows the dtype
            of W.

    Cost: ``8 m n r`` FLOPs and one selection among ``m n`` scores an iteration, in float64 for a W
    of float64, else in float32, with six matrices of the size of W in memory at 3 % and nine at
    30 %, and some 30 MB for an error in float64. With full moments ``12 m n r`` FLOPs and
    ``2 m n^2`` for each ``t`` tried, 1.1 to 1.4 an iteration, with eleven matrices and three of the
    size of C, one of them in float32. The error of an ill-conditioned C is a difference of large
    numbers: it is computed in float64 at the beginning and the end and whenever it has fallen to
    1/4, and once it is below 0.1 % of ``||W C^(1/2)||_F`` or of ``||W D^(1/2)||_F`` so are the
    iterations, with nineteen matrices of float32. Inputs smaller than the largest times the eps of
    the iterations are taken as never seen, unless large weights make up for it.

    Sources: Zhou, Tao, GoDec (ICML 2011) for the alternation; Zhang, Papyan, OATS (ICLR 2025) for
    the diagonal weighting; Makni et al., HASSLE-free (2025) for the full objective; Barzilai,
    Borwein (1988) for the length of steps.

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
    check_rank(rank, m, n, op)
    wanted = wanted_places(op, density, m, n, family)
    check_integer("iterations", iterations, op)
    check_integer("seed", seed, op)
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}, wanted at least 1")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")
    A, scale = scaled("W", W, op)
    moments = Moments(inputs, A, op)

    whole = energy(A, moments)
    how = rank, wanted, family, iterations, seed
    with torch.autocast(W.device.type, enabled=False):
        if moments.plain or density == 1:  # where S takes all that U V leaves, whatever the norm
            found = nearest(A, *how)
        else:
            found = _nearest_in_columns(moments, whole, A, how)
    U, V = balanced(found.P, found.V, scale, W.dtype)
    values = (found.values * scale).to(W.dtype)
    S = found.pattern.scatter(values)
    error = relative(lost(W, U, V, S, scale, moments), whole)
    check_finite(op, W.dtype, error, U, V, values)
    errors = [relative(loss, whole) for loss in found.losses]
    return SparseLowRank(U, V, found.pattern, values, error, errors)


def _nearest_in_columns(
    moments: Moments, whole: float, W: Tensor, how: tuple[int, int, str, int, int]
) -> Found:
    """In the norm of moments: the nearest matrix to ``W D^(1/2)``, ``D`` their diagonal, divided by
    it again."""
    root = moments.diagonal.sqrt().to(W.dtype)
    limits = torch.finfo(root.dtype)
    X = W * root
    seen = root > limits.tiny  # so that its inverse is a number
    if moments.full is None:
        found = nearest(X, *how)
    else:
        part = X.abs().amax(0)  # of an output; the rest is less than its rounding
        seen &= (root > limits.eps * root.max()) | (part > limits.eps * part.max())
        C = moments.correlations(seen)
        found = nearest_in(C, whole, X.masked_fill_(~seen, 0), *how)
    inverse = torch.where(seen, 1 / root, 0.0)
    places = found.pattern._flat()
    column = places % W.shape[1]
    V, values = found.V * inverse, found.values * inverse[column]
    if not bool(seen.all()):  # what costs nothing is approximated as if it did
        W = W.to(V.dtype)
        V = torch.where(seen, V, found.P.T @ W)
        values = torch.where(seen[column], values, (W - found.P @ V).view(-1)[places])
    return found._replace(V=V, values=values)
