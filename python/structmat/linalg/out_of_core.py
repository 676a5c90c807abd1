# SPDX-License-Identifier: Apache-2.0
"""The truncated SVD of a matrix that is read in blocks of rows, in few passes.

A sweep gives ``Y = A X`` and ``Z = A^T Y`` from one reading. With ``Y = Q R``, ``T = A^T Q``, which
is ``Z R^-1``, and ``T = V S W^T``, its singular value decomposition, V is the next X, and in the
end ``A ~ (Q W) S V^T``. A sweep is worth two passes of subspace iteration. Q is formed in the end.

Where columns of Y are nearly dependent, ``Z R^-1`` has lost what rounding of the large singular
values left of the small ones. That happens to a random X whose ``sigma_1 / sigma_k`` exceeds the
root of 1 / eps, hardly to an X of singular vectors, whose Y has nearly orthogonal columns. It is
seen in R, and then Q is formed and ``A^T Q`` takes one more reading.
"""

import operator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .block_sweeps import BlockSweeps
from .certificate import PROBES
from .matrix_free import _Basis, default_oversample
from .operands import Operand
from .row_blocks import Blocks
from .sides import Side, together
from .svd import SVDResult, check_integer

_OP = "svd_out_of_core"


def svd_out_of_core(
    blocks: Blocks,
    rank: int,
    *,
    sweeps: int = 2,
    oversample: int | None = None,
    center: bool = False,
    seed: int = 0,
    block_rows: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    group: Any = None,
) -> SVDResult:
    """The leading singular triplets of a matrix that does not fit into memory.

    ``A (m, n)`` is read in blocks of rows, once a sweep. Each sweep makes both products with a
    block, ``Y = A X`` and ``Z = A^T Y``, and so is worth two of :func:`randomized_svd`'s. While one
    is computed with, the next are read.

    Args:
        blocks: a path of a ``.npy`` file or of a ``.safetensors`` file with one tensor,
            ``"file.safetensors::name"`` where there are several; or a callable without arguments,
            called once a sweep and once before, for its first block, that returns an iterator of
            blocks ``(rows, n)``: dense or CSR tensors, NumPy arrays or SciPy CSR matrices, of any
            numbers of rows, which are copied. A column-major ``.npy`` file is read by columns.
        rank: ``k``, 1 to ``min(m, n)``.
        sweeps: readings, at least 1, with ``center`` at least 2. One more is made where the
            singular values span more than the root of the dtype's precision and the first sweep
            could not see the small ones; ``.info.sweeps`` says how many there were.
        oversample: columns beyond ``rank``; as in :func:`randomized_svd`.
        center: subtract the mean of the rows, found in the first sweep.
        seed: of the random block, 0 to 2^63 - 1.
        block_rows: rows of a block of a file; by default as many as 16 MB hold.
        dtype: float32 or float64, of the computation and the result; by default float64 for
            float64 blocks, else float32.
        device: where it is computed; by default where the blocks are.
        progress: show a bar on standard error, if that is a terminal and it takes over a second.
        group: a ``torch.distributed`` process group; ``blocks`` are this rank's rows of ``A``,
            below those of lower ranks. Each rank gets its rows of ``U`` and the same bits of ``S``
            and ``Vh``.

    Returns:
        :class:`SVDResult`: ``U (m, k)``, ``S (k,)``, ``Vh (k, n)``, signs as in
        :func:`randomized_svd`. ``.info.error`` estimates ``||A - U diag(S) Vh||_F / ||A||_F``.

    Raises:
        TypeError: blocks of integers, masked arrays, or of another kind than above; a wrong
            argument.
        ValueError: there are no rows, or fewer than ``rank``; blocks differ in width, or a sweep
            has another number of rows than the first; a CSR block is invalid, or one of its sizes
            2^31 or more; a file is cut off or its header contradicts itself; an argument is out of
            range.
        FileNotFoundError: there is no such file.
        torch.linalg.LinAlgError: a block contains NaN or Inf, or products exceed the range of the
            dtype.
        RuntimeError: another rank of the group failed.

    Cost: ``4 m n l`` FLOPs a sweep, ``l = rank + oversample``, and ``O((m + n) l^2)``. Memory: up
    to four blocks, ``4 m (l + 8)`` numbers for what becomes ``U``, and ``O(n l)``.

    Source: Halko, Martinsson, Shkolnisky, Tygert, SIAM J. Sci. Comput. 33 (2011); Demmel, Grigori,
    Hoemmen, Langou, SIAM J. Sci. Comput. 34 (2012) (QR by blocks).

    Example:
        >>> import numpy as np, torch, structmat as sm
        >>> A = np.random.randn(500, 6) @ np.random.randn(6, 80)
        >>> np.save("A.npy", A)
        >>> U, S, Vh = result = sm.linalg.svd_out_of_core("A.npy", 6)
        >>> bool(np.allclose((U * S) @ Vh, A)), result.info.sweeps
        (True, 2)
        >>> blocks = lambda: (A[i : i + 100] for i in range(0, 500, 100))
        >>> torch.allclose(sm.linalg.svd_out_of_core(blocks, 6).S, S)
        True
    """
    rank, sweeps, oversample, seed, block_rows = together(
        _OP,
        group,
        lambda: _checked(rank, sweeps, oversample, center, seed, block_rows, dtype, device, group),
    )
    extra = default_oversample(rank) if oversample is None else oversample
    with torch.no_grad():
        readings = BlockSweeps(blocks, block_rows, dtype, device, group, center, progress)
        with readings.bar:
            options = {"rank": rank, "sweeps": sweeps, "oversample": extra}
            readings.open({**options, "center": center, "seed": seed, "wanted dtype": dtype})
            return _decomposed(readings, rank, sweeps, extra, seed)


def _checked(
    rank: Any,
    sweeps: Any,
    oversample: Any,
    center: Any,
    seed: Any,
    block_rows: Any,
    dtype: Any,
    device: Any,
    group: Any,
) -> tuple[int, int, int | None, int, int | None]:
    found: list[Any] = []
    for name, value, least in (
        ("rank", rank, 1),
        ("sweeps", sweeps, 1),
        ("oversample", oversample, 0),
        ("seed", seed, 0),
        ("block_rows", block_rows, 1),
    ):
        if value is None and name in ("oversample", "block_rows"):
            found.append(None)
            continue
        check_integer(name, value, _OP)
        if value < least:
            raise ValueError(f"{_OP}: {name} is {value}, wanted at least {least}")
        found.append(operator.index(value))
    if found[3] >= 2**63:
        raise ValueError(f"{_OP}: seed is {seed}, wanted 0 to 2^63 - 1")
    if not isinstance(center, bool):
        raise TypeError(f"{_OP}: center must be a bool, got {type(center).__name__}")
    if center and found[1] < 2:
        raise ValueError(f"{_OP}: sweeps is 1, wanted at least 2 with center: one finds the mean")
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"{_OP}: dtype is {dtype}, wanted float32 or float64")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{_OP}: group must be a ProcessGroup, got {type(group).__name__}")
    if device is not None:
        torch.device(device)
    return found[0], found[1], found[2], found[3], found[4]


def _decomposed(sweeps: BlockSweeps, rank: int, number: int, extra: int, seed: int) -> SVDResult:
    """From `number` sweeps with ``rank + extra`` columns, or one more where they lose too much."""
    n, cols, dtype = sweeps.width, sweeps.cols, sweeps.like.dtype
    if rank > n:
        raise ValueError(f"{_OP}: rank is {rank}, wanted 1 to {n}, the number of columns")
    width = min(rank + extra, n)
    X = cols.orthonormalize(cols.sketch(width, seed, 0, sweeps.like), None, seed)
    for _ in range(number - 1):
        Y, Z, unit = sweeps.sweep(X)
        width = _width(width, rank, sweeps.rows)
        Y, Z = Y[:, :width], Z[:, :width]  # the first columns of a sketch are one
        R = sweeps.rows.qr(Y, factor=False)[1]
        T = _agreed(_quotient(Z, R, unit, rank, last=False), Z, sweeps.rows)
        if T is None:
            T = sweeps.transposed(sweeps.rows.qr(Y)[0])
        del Y, Z  # as large as U
        T = T.to(dtype)
        X = cols.orthonormalize(T, None, seed)
        X = (X @ torch.linalg.svd((X.mT @ T).double())[0].to(dtype)).contiguous()
        cols.same(X)
    Y, Z, unit = sweeps.sweep(X, probe_seed=seed)
    rows = sweeps.rows
    width = _width(width, rank, rows)
    Q, R = rows.qr(Y[:, :width])
    Z = Z[:, :width]
    T = _agreed(_quotient(Z, R, unit, rank, last=True), Z, rows)
    if T is None:
        T = sweeps.transposed(Q)
    norm = sweeps.norm()
    operand = Operand(
        rows, cols, sweeps.like, lambda X: sweeps.sweep(X).Y, sweeps.transposed, lambda _: norm
    )
    basis = _Basis(operand, seed)
    basis.Q, basis.T, basis.probes = Q, T.to(dtype), Y[:, -PROBES:]
    basis.complete = width == min(rows.size, n)
    basis.sweeps = sweeps.count
    basis.factor()
    swapped = sweeps.source.transposed
    return basis.result(operand.transposed() if swapped else operand, rank, None, swapped)


def _width(width: int, rank: int, rows: Side) -> int:
    if rank > rows.size:
        raise ValueError(f"{_OP}: rank is {rank}, wanted 1 to {rows.size}, the number of rows")
    return min(width, rows.size)


def _agreed(T: Tensor | None, Z: Tensor, rows: Side) -> Tensor | None:
    """T or None as the first rank has it: rounding must not have them read again alone."""
    (lost,) = rows.agreed([float(T is None)], Z.device)
    if lost:
        return None
    T = torch.empty_like(Z, memory_format=torch.contiguous_format) if T is None else T
    T = T.contiguous()
    rows.same(T)
    return T


def _quotient(Z: Tensor, R: Tensor, unit: float, rank: int, last: bool) -> Tensor | None:
    """``T = Z R^-1``, or None where rounding has taken what is wanted of it.

    Column j of T errs by ``eps sigma_1 |R_:j| / R_jj``. A basis on the way may have errors of a
    tenth of ``R_jj``, the last one of some units of rounding. Columns of rounding alone become 0.
    """
    eps = torch.finfo(Z.dtype if R.dtype == torch.float64 else R.dtype).eps
    R = R.double() / (unit or 1.0)
    norms = torch.linalg.vector_norm(R, dim=0)
    pivots = R.diagonal().abs()
    largest = float(norms.max())
    noise = pivots <= 16 * eps * largest
    amplified = norms / torch.where(pivots > 0, pivots, 1)
    limit = 30 if last else 0.1 / eps**0.5
    lost = ~noise & (amplified > limit)
    # In the last sweep oversampled columns count too: T's factors mix all of them.
    if (lost if last else lost[:rank]).any():
        return None
    drop = noise & ((amplified > 16) | (pivots == 0))
    R, Z = R.clone(), Z.clone()
    R[:, drop], R[drop, :] = 0, 0
    R.diagonal()[drop] = 1
    Z[:, drop] = 0
    return torch.linalg.solve_triangular(R, Z, upper=True, left=False)
