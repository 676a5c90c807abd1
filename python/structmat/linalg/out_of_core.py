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

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .certificate import PROBES
from .matrix_free import _PROBE_NUMBER, _Basis, default_oversample
from .operands import Operand, norm_of, working_dtype
from .progress import Bar
from .row_blocks import Blocks, Source, open_source, reading_ahead
from .sides import Side, gathered, together
from .svd import SVDResult

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
        TypeError: blocks of integers, or of another kind than above; a wrong argument.
        ValueError: there are no rows, or fewer than ``rank``; blocks differ in width, or a sweep
            has another number of rows than the first; a file is cut off; an argument is out of
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
        run = _Run(blocks, block_rows, dtype, device, group, seed, center, progress)
        with run.bar:
            run.open((rank, sweeps, extra, center, seed, str(dtype)))
            return run.decompose(rank, sweeps, extra)


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
        try:
            if isinstance(value, bool):
                raise TypeError
            number = operator.index(value)
        except TypeError:
            raise TypeError(
                f"{_OP}: {name} must be an integer, got {type(value).__name__}"
            ) from None
        if number < least:
            raise ValueError(f"{_OP}: {name} is {number}, wanted at least {least}")
        found.append(number)
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


class _Run:
    """The sweeps over one source."""

    def __init__(
        self,
        blocks: Any,
        block_rows: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        group: Any,
        seed: int,
        center: bool,
        progress: bool,
    ) -> None:
        self.source: Source
        self._blocks, self._block_rows = blocks, block_rows
        self._dtype, self._device = dtype, device
        self.group, self.seed, self.center = group, seed, center
        shown = progress and (group is None or dist.get_rank(group) == 0)
        self.bar = Bar("reading", shown)
        self.sweeps = 0
        self._room: Tensor | None = None  # of a centred block
        self.count: int | None = None  # rows here, known after a sweep

    def open(self, arguments: Any) -> None:
        """Looks at the first block. Ranks tell each other what they found, so that an error of one
        is an error of all."""
        first: Tensor | None = None

        def look() -> None:
            nonlocal first
            self.source = open_source(self._blocks, self._block_rows)
            if self.group is not None and self.source.transposed:
                raise ValueError(
                    f"{_OP}: {self._blocks} is column-major, wanted row-major rows of this rank"
                )
            for first in self.source.blocks():
                if len(first):
                    break
            if first is None or not first.shape[1]:
                raise ValueError(f"{_OP}: there are no rows")

        together(_OP, self.group, look)
        assert first is not None
        self.width = first.shape[1]
        self.dtype = self._dtype or working_dtype(first.dtype)
        device = first.device if self._device is None else torch.device(self._device)
        self.like = torch.empty(0, dtype=self.dtype, device=device)
        facts = (self.width, str(self.dtype), *arguments)
        for other, found in enumerate(gathered(self.group, facts)):
            if found != facts:
                raise ValueError(
                    f"{_OP}: columns, dtype, rank, sweeps, oversample, center, seed and wanted "
                    f"dtype are {facts} here and {found} on rank {other} of the group"
                )
        # The mean of a few rows, until that of all is known: products do not cancel that much.
        self.shift: Tensor | None = None
        if self.center and not self.source.transposed:
            start = first.to_dense() if first.layout == torch.sparse_csr else first
            total = start.to(device).sum(0, dtype=torch.float64)
            self.shift = (total / max(len(start), 1)).to(self.dtype)
            Side(0, self.group, self._ranks()).same(self.shift)
        self.bar.total = self.source.bytes

    def decompose(self, rank: int, sweeps: int, extra: int) -> SVDResult:
        n = self.width
        if rank > n:
            raise ValueError(f"{_OP}: rank is {rank}, wanted 1 to {n}, the number of columns")
        cols = Side(n, peers=self.group)
        width = min(rank + extra, n)
        X = cols.orthonormalize(cols.sketch(width, self.seed, 0, self.like), None, self.seed)
        for _ in range(sweeps - 1):
            Y, Z, R, unit = self._sweep(X, cols, probe=False)
            rows = self._rows(rank)
            width = min(width, rows.size)  # the first columns of a sketch are one
            Z = Z[:, :width]
            T = _quotient(Z, R[:width, :width], unit, rank, last=False)
            T = self._agreed(T, Z, rows)
            if T is None:
                Q, _ = rows.qr(Y[:, :width].contiguous())
                T = self._transposed(Q, cols)
                del Q
            del Y, Z  # as large as U
            T = T.to(self.dtype)
            X = cols.orthonormalize(T, None, self.seed)
            X = (X @ torch.linalg.svd((X.mT @ T).double())[0].to(self.dtype)).contiguous()
            cols.same(X)
        Y, Z, _, unit = self._sweep(X, cols, probe=True)
        rows = self._rows(rank)
        width = min(width, rows.size)
        Q, R = rows.qr(Y[:, :width].contiguous())
        Z = Z[:, :width]
        T = self._agreed(_quotient(Z, R, unit, rank, last=True), Z, rows)
        if T is None:
            T = self._transposed(Q, cols)
        T = T.to(self.dtype)
        norm = self._norm(rows)
        operand = Operand(rows, cols, self.like, _no_product, _no_product, lambda _: norm)
        basis = _Basis(operand, self.seed)
        basis.Q, basis.T, basis.probes = Q, T, Y[:, -PROBES:]
        basis.complete = width == min(rows.size, n)
        basis.sweeps = self.sweeps
        basis.factor()
        swapped = self.source.transposed
        return basis.result(operand.transposed() if swapped else operand, rank, None, swapped)

    # ---- readings ---------------------------------------------------------------------------
    def _sweep(self, X: Tensor, cols: Side, *, probe: bool) -> tuple[Tensor, Tensor, Tensor, float]:
        """Y; Z in units of `unit`; R of Y. The last sweep has the probes beside Y instead of R, and
        the norm."""
        width = X.shape[1]
        wide = X
        if probe:
            G = cols.sketch(PROBES, self.seed, _PROBE_NUMBER, self.like)
            wide = torch.cat([X, G], 1)
        kept: list[Tensor] = []
        R = X.new_zeros(0, width)
        Z = torch.zeros(self.width, width, dtype=torch.float64, device=X.device)
        unit = 0.0
        total = torch.zeros_like(Z[:, 0]) if self.center and self.count is None else None
        self._squares: list[float] = []
        out = None if self.count is None else X.new_empty(self.count, wide.shape[1])

        def take(block: Tensor, first: int) -> None:
            nonlocal R, unit
            A = self._centred(block)
            Y = _times(A, wide, self._sparse_shift(A))
            if out is None:
                kept.append(Y)
            else:
                out[first : first + len(Y)] = Y
            Y = Y[:, :width]
            largest = float(Y.abs().amax()) if len(Y) else 0.0
            if not largest < math.inf:
                self._refuse(block)
            if largest > 0:
                scale = 2.0 ** math.floor(math.log2(largest))
                if scale > unit:  # squares of Y stay in range
                    Z.mul_(unit / scale)
                    unit = scale
                part = _transposed_times(A, Y / scale, self._sparse_shift(A))
                if not part.isfinite().all():
                    self._refuse(block)
                Z.add_(part, alpha=scale / unit)
                if not probe:
                    R = torch.linalg.qr(torch.cat([R, Y]), mode="r").R
            if total is not None:
                total.add_(_column_sums(block.to(Z.device)))
            if probe:
                self._squares.append(self._block_norm(A))

        self._read(take)
        rows = Side.of_shard(self.count or 0, self.group, Z.device)
        if total is not None and self.shift is not None:
            self.shift = (rows.sum(total) / max(rows.size, 1)).to(self.dtype)
        R = torch.nn.functional.pad(R, (0, 0, 0, width - len(R)))
        if self.group is not None:
            units = torch.tensor([unit], dtype=torch.float64, device=Z.device)
            rows.max(units)
            Z.mul_(unit / float(units) if float(units) else 1.0)
            unit = float(units)
            R = torch.linalg.qr(torch.cat(rows.gather(R)), mode="r").R
        rows.sum(Z)
        Y = torch.cat(kept) if out is None else out
        return Y, Z, R, unit

    def _transposed(self, Q: Tensor, cols: Side) -> Tensor:
        """``A^T Q`` in one more reading."""
        T = torch.zeros(self.width, Q.shape[1], dtype=torch.float64, device=Q.device)

        def take(block: Tensor, first: int) -> None:
            A = self._centred(block)
            part = _transposed_times(A, Q[first : first + len(block)], self._sparse_shift(A))
            if not part.isfinite().all():
                self._refuse(block)
            T.add_(part)

        self._read(take)
        return Side(0, self.group, self._ranks()).sum(T)

    def _read(self, take: Callable[[Tensor, int], None]) -> None:
        """Calls ``take(block, first row)`` for all blocks of a sweep."""

        def sweep() -> None:
            rows = 0
            with reading_ahead(self.source) as blocks:
                for block in blocks:
                    if block.shape[1] != self.width:
                        raise ValueError(
                            f"{_OP}: a block after {rows} rows has {block.shape[1]} columns, "
                            f"wanted {self.width} as the first has"
                        )
                    if self.count is not None and rows + len(block) > self.count:
                        raise ValueError(
                            f"{_OP}: sweep {self.sweeps} has more than the {self.count} rows of "
                            "the first"
                        )
                    take(block, rows)
                    rows += len(block)
                    self.bar.advance(block)
            if self.count is not None and rows != self.count:
                raise ValueError(
                    f"{_OP}: sweep {self.sweeps} has {rows} rows, the first had {self.count}"
                )
            self.count = rows

        self.sweeps += 1
        self.bar.restart(f"sweep {self.sweeps}")
        together(_OP, self.group, sweep)

    def _centred(self, block: Tensor) -> Tensor:
        """The block in the type and place of the computation, a dense one less the mean."""
        if block.layout == torch.sparse_csr:
            return torch.sparse_csr_tensor(
                block.crow_indices().int(),
                block.col_indices().int(),
                block.values().to(self.dtype),
                block.shape,
                device=self.like.device,
                check_invariants=True,
            )
        A = block.to(self.like)
        if self.shift is not None:
            # In one place: the heap would keep holes between what is allocated in the meantime.
            if self._room is None or len(self._room) < len(A):
                self._room = torch.empty_like(A)
            return torch.sub(A, self.shift, out=self._room[: len(A)])
        if self.center:  # what comes are columns
            return A - A.mean(1, keepdim=True, dtype=torch.float64).to(self.dtype)
        return A

    def _sparse_shift(self, A: Tensor) -> Tensor | None:
        return self.shift if A.layout == torch.sparse_csr else None

    def _block_norm(self, A: Tensor) -> float:
        if A.layout == torch.sparse_csr:
            values = A.values().double()
            if self.shift is None:
                return norm_of([values], Side(0), self.like)
            shift, col = self.shift.double(), A.col_indices().long()
            empty = len(A) - torch.bincount(col, minlength=self.width)
            return norm_of([values - shift[col], shift * empty.sqrt()], Side(0), self.like)
        # Rows in their own type: a float32 sum of n squares errs by less than the products do.
        found = float(torch.linalg.vector_norm(A, dim=1).double().square().sum().sqrt())
        if 1e-12 < found < 1e18:
            return found
        return norm_of([A], Side(0), self.like)

    def _norm(self, rows: Side) -> float:
        return norm_of(
            [torch.tensor(self._squares, dtype=torch.float64, device="cpu")], rows, self.like
        )

    def _refuse(self, block: Tensor) -> None:
        values = block.values() if block.layout == torch.sparse_csr else block
        reason = (
            f"products exceed the range of {self.dtype}"
            if bool(values.isfinite().all())
            else "a block contains NaN or Inf"
        )
        raise torch.linalg.LinAlgError(f"{_OP}: {reason}")  # type: ignore[attr-defined]

    # ---- ranks ------------------------------------------------------------------------------
    def _rows(self, rank: int) -> Side:
        rows = Side.of_shard(self.count or 0, self.group, self.like.device)
        if rows.size == 0:
            raise ValueError(f"{_OP}: there are no rows")
        if rank > rows.size:
            raise ValueError(f"{_OP}: rank is {rank}, wanted 1 to {rows.size}, the number of rows")
        return rows

    def _ranks(self) -> list[int]:
        return [0] * (1 if self.group is None else dist.get_world_size(self.group))

    def _agreed(self, T: Tensor | None, Z: Tensor, rows: Side) -> Tensor | None:
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


def _times(A: Tensor, X: Tensor, shift: Tensor | None) -> Tensor:
    Y = A @ X
    return Y if shift is None else Y - shift @ X


def _transposed_times(A: Tensor, Y: Tensor, shift: Tensor | None) -> Tensor:
    if A.layout != torch.sparse_csr:
        return A.mT @ Y
    out = A.t() @ Y.contiguous()
    return out if shift is None else out - torch.outer(shift, Y.sum(0))


def _column_sums(block: Tensor) -> Tensor:
    if block.layout == torch.strided:
        return block.sum(0, dtype=torch.float64)
    ones = torch.ones(1, len(block), dtype=torch.float64, device=block.device)
    wide = torch.sparse_csr_tensor(
        block.crow_indices(), block.col_indices(), block.values().double(), block.shape,
        check_invariants=False,
    )  # fmt: skip
    return (wide.t() @ ones.mT)[:, 0]


def _no_product(X: Tensor) -> Tensor:
    raise NotImplementedError
