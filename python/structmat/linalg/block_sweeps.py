# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix that is read in blocks of rows, each reading giving two: ``Y = A X`` and
``Z = A^T Y``.

On the CPU both are one call into the core. Its tiles go to whichever thread is free, while torch's
products wait for the one whose core the reader of the next block has: 4194 x 1000 times 48 columns
took them 3.1 ms alone and 7 beside it, and each of the small steps in between a millisecond.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .certificate import PROBES
from .matrix_free import _PROBE_NUMBER
from .operands import norm_of, working_dtype
from .progress import Bar
from .row_blocks import Source, open_source, reading_ahead
from .sides import Side, require_same, together

_OP = "svd_out_of_core"
_UNIT, _NORM, _FINITE = range(3)  # BlockFacts of structmat/out_of_core.h


class Swept(NamedTuple):
    Y: Tensor  # with the probes beside it, where they were asked for
    Z: Tensor  # float64, in units of `unit`: squares of Y stay in range
    unit: float


class BlockSweeps:
    """The readings of one source, on every rank of a group of its own rows."""

    def __init__(
        self,
        blocks: Any,
        block_rows: int | None,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        group: Any,
        center: bool,
        progress: bool,
    ) -> None:
        self.source: Source
        self._blocks, self._block_rows = blocks, block_rows
        self._dtype, self._device = dtype, device
        self.group, self.center = group, center
        shown = progress and (group is None or dist.get_rank(group) == 0)
        self.bar = Bar("reading", shown)
        self.count = 0  # sweeps so far
        self.rows: Side  # known after a sweep
        self.shift: Tensor | None  # the mean, where it leaves row by row
        self._length: int | None = None  # rows here
        self._room: Tensor | None = None  # of a block converted or centred
        self._norms: list[float] = []  # of blocks

    def open(self, arguments: dict[str, Any]) -> None:
        """Looks at the first block. Ranks tell each other what they found, so that an error of one
        is an error of all."""

        def look() -> Tensor | None:
            first: Tensor | None = None
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
            if "meta" in (first.device.type, torch.device(self._device or "cpu").type):
                raise ValueError(f"{_OP}: blocks or computation are on meta, which has no numbers")
            dtype = self._dtype or working_dtype(first.dtype)
            device = first.device if self._device is None else torch.device(self._device)
            self.like = torch.empty(0, dtype=dtype, device=device)
            self.width, self._place = first.shape[1], first.device
            if not self.center or self.source.transposed:
                return None
            # The mean of a few rows, until that of all is known: products do not cancel that much.
            start = first.to_dense() if first.layout == torch.sparse_csr else first
            total = start.to(device).sum(0, dtype=torch.float64)
            return (total / max(len(start), 1)).to(dtype)

        self.shift = together(_OP, self.group, look)
        self.cols = Side(self.width, peers=self.group)
        like = {"dtype": self.like.dtype, "device": self.like.device.type}
        require_same(_OP, self.group, {"columns": self.width, **like, **arguments})
        if self.shift is not None:
            self.cols.same(self.shift)
        self.bar.total = self.source.bytes

    # ---- products ---------------------------------------------------------------------------
    def sweep(self, X: Tensor, probe_seed: int | None = None) -> Swept:
        """One reading. With a seed Y has the products of the probes too, and the norm of A comes
        along."""
        width, probe = X.shape[1], probe_seed is not None
        wide = X.contiguous()
        if probe_seed is not None:
            G = self.cols.sketch(PROBES, probe_seed, _PROBE_NUMBER, self.like)
            wide = torch.cat([X, G], 1).contiguous()
        Z = torch.zeros(self.width, width, dtype=torch.float64, device=X.device)
        facts = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64, device="cpu")
        total = torch.zeros_like(Z[:, 0]) if self.center and self._length is None else None
        self._norms = []
        kept: list[Tensor] = []
        Y = torch.empty(0)

        def start() -> None:
            nonlocal Y
            length = self._length
            if length is None and self.source.shape is not None:
                length = self.source.shape[0]
            if length is not None:
                Y = X.new_empty(length, wide.shape[1])
                kept.append(Y)

        def take(block: Tensor, first: int) -> None:
            if kept and kept[0] is Y:
                y = Y[first : first + len(block)]
            else:
                y = X.new_empty(len(block), wide.shape[1])
                kept.append(y)
            if len(block) == 0:
                return
            self._multiply(self._converted(block), wide, y, Z, facts, probe)
            if not facts[_FINITE]:
                self._refuse(block)
            if total is not None:
                total.add_(_column_sums(block.to(Z.device)))
            if probe:
                self._norms.append(float(facts[_NORM]))

        def finish() -> None:
            nonlocal Y
            if kept and kept[0] is not Y:
                Y = torch.cat(kept)

        self._read(take, start, finish)
        rows = self.rows
        if total is not None and self.shift is not None:
            self.shift = (rows.sum(total) / max(rows.size, 1)).to(self.like.dtype)
        unit = float(facts[_UNIT])
        if self.group is not None:
            units = torch.tensor([unit], dtype=torch.float64, device=Z.device)
            rows.max(units)
            Z.mul_(unit / float(units) if float(units) else 1.0)
            unit = float(units)
        rows.sum(Z)
        return Swept(Y, Z, unit)

    def _multiply(
        self, A: Tensor, X: Tensor, Y: Tensor, Z: Tensor, facts: Tensor, measure: bool
    ) -> None:
        """structmat/out_of_core.h says what of: ``Y = A X``, Z grows by ``A^T Y`` in units of
        facts[0], and facts[1] is the norm of A."""
        if A.layout == torch.strided and not A.is_cuda:
            torch.ops.structmat.block_sweep(A, X, Y, Z, facts, measure)
            return
        shift = self.shift if A.layout == torch.sparse_csr else None
        Y.copy_(_times(A, X, shift))
        y = Y[:, : Z.shape[1]]
        largest = float(torch.linalg.vector_norm(y, math.inf))
        facts[_FINITE] = float(largest < math.inf)
        if measure:
            facts[_NORM] = self._block_norm(A)
        if not 0 < largest < math.inf:
            return
        scale = 2.0 ** math.floor(math.log2(largest))
        unit = max(scale, float(facts[_UNIT]))
        part = _transposed_times(A, y / scale, shift).double()
        Z.mul_(float(facts[_UNIT]) / unit).add_(part, alpha=scale / unit)
        facts[_UNIT] = unit
        facts[_FINITE] = float(part.isfinite().all())

    def transposed(self, Q: Tensor) -> Tensor:
        """``A^T Q``, float64, in one reading."""
        T = torch.zeros(self.width, Q.shape[1], dtype=torch.float64, device=Q.device)

        def take(block: Tensor, first: int) -> None:
            A = self._converted(block)
            shift = self.shift if A.layout == torch.sparse_csr else None
            part = _transposed_times(A, Q[first : first + len(block)], shift)
            if not part.isfinite().all():
                self._refuse(block)
            T.add_(part)

        self._read(take)
        return self.rows.sum(T)

    def norm(self) -> float:
        """``||A||_F``, of the last sweep."""
        norms = torch.tensor(self._norms, dtype=torch.float64, device="cpu")
        return norm_of([norms], self.rows, self.like)

    # ---- reading ----------------------------------------------------------------------------
    def _read(
        self,
        take: Callable[[Tensor, int], None],
        start: Callable[[], None] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        """Calls ``take(block, first row)`` for all blocks of a sweep."""

        def work() -> None:
            if start is not None:
                start()
            rows = 0
            with reading_ahead(self.source, self._place) as blocks:
                for block in blocks:
                    if block.shape[1] != self.width:
                        raise ValueError(
                            f"{_OP}: a block after {rows} rows has {block.shape[1]} columns, "
                            f"wanted {self.width} as the first has"
                        )
                    if block.device != self._place:
                        raise ValueError(
                            f"{_OP}: a block after {rows} rows is on {block.device}, wanted "
                            f"{self._place} as the first is"
                        )
                    if self._length is not None and rows + len(block) > self._length:
                        raise ValueError(
                            f"{_OP}: sweep {self.count} has more than the {self._length} rows of "
                            "the first"
                        )
                    take(block, rows)
                    rows += len(block)
                    self.bar.advance(block)
            if self._length is not None and rows != self._length:
                raise ValueError(
                    f"{_OP}: sweep {self.count} has {rows} rows, the first had {self._length}"
                )
            if rows == 0 and self.group is None:
                raise ValueError(f"{_OP}: there are no rows")
            self._length = rows
            if finish is not None:
                finish()

        self.count += 1
        self.bar.restart(f"sweep {self.count}")
        together(_OP, self.group, work)
        if self.count == 1:
            self.rows = Side.of_shard(self._length or 0, self.group, self.like.device)
            if self.rows.size == 0:
                raise ValueError(f"{_OP}: there are no rows")

    def _converted(self, block: Tensor) -> Tensor:
        """The block in the type and place of the computation, a dense one less the mean."""
        if block.layout == torch.sparse_csr:
            return torch.sparse_csr_tensor(
                block.crow_indices().int(),
                block.col_indices().int(),
                block.values().to(self.like.dtype),
                block.shape,
                device=self.like.device,
                check_invariants=False,  # row_blocks has checked them
            )
        centred = self.center  # if the source is transposed, of each row
        wide = self.like.dtype == torch.float64
        if (
            not centred
            and block.device == self.like.device
            and (block.dtype == self.like.dtype or (block.device.type == "cpu" and not wide))
            and (block.dtype == torch.float64) == wide
        ):
            return block  # 16-bit numbers are converted as they are multiplied
        # In one place: the heap would keep holes between what is allocated in the meantime, and
        # blocks of 33 MB made it grow to the size of the file.
        if self._room is None or len(self._room) < len(block):
            self._room = None
            self._room = self.like.new_empty(block.shape)
        A = self._room[: len(block)].copy_(block)
        if self.shift is not None:
            A.sub_(self.shift)
        elif centred:
            A.sub_(A.mean(1, keepdim=True, dtype=torch.float64).to(A.dtype))
        return A

    def _block_norm(self, A: Tensor) -> float:
        if A.layout == torch.sparse_csr:
            values = A.values().double()
            if self.shift is None:
                return norm_of([values], Side(0), self.like)
            shift, col = self.shift.double(), A.col_indices().long()
            empty = len(A) - torch.bincount(col, minlength=self.width)
            return norm_of([values - shift[col], shift * empty.sqrt()], Side(0), self.like)
        return norm_of(A.split(_few_rows(A)), Side(0), self.like)

    def _refuse(self, block: Tensor) -> None:
        values = block.values() if block.layout == torch.sparse_csr else block
        reason = (
            f"products exceed the range of {self.like.dtype}"
            if bool(values.isfinite().all())
            else "a block contains NaN or Inf"
        )
        raise torch.linalg.LinAlgError(f"{_OP}: {reason}")  # type: ignore[attr-defined]


def _times(A: Tensor, X: Tensor, shift: Tensor | None) -> Tensor:
    Y = A @ X
    return Y if shift is None else Y - shift @ X


def _transposed_times(A: Tensor, Y: Tensor, shift: Tensor | None) -> Tensor:
    if A.layout != torch.sparse_csr:
        return A.mT @ Y
    out = A.t() @ Y.contiguous()
    return out if shift is None else out - torch.outer(shift, Y.sum(0))


def _few_rows(A: Tensor) -> int:
    """Of a block, for what is made of them in float64 to be small beside it."""
    return max(1, (1 << 18) // max(A.shape[1], 1))


def _column_sums(block: Tensor) -> Tensor:
    if block.layout == torch.strided:
        parts = block.split(_few_rows(block))
        return torch.stack([part.sum(0, dtype=torch.float64) for part in parts]).sum(0)
    ones = torch.ones(1, len(block), dtype=torch.float64, device=block.device)
    wide = torch.sparse_csr_tensor(
        block.crow_indices(), block.col_indices(), block.values().double(), block.shape,
        check_invariants=False,
    )  # fmt: skip
    return (wide.t() @ ones.mT)[:, 0]


@torch.library.register_fake("structmat::block_sweep")
def _(A: Tensor, X: Tensor, Y: Tensor, Z: Tensor, facts: Tensor, measure: bool) -> None:
    return None
