# SPDX-License-Identifier: Apache-2.0
"""The index of a sparse pattern: where its entries are, for whoever reads or moves them."""

from typing import Any, TypeVar

import torch
from torch import Tensor

from .families import SLAB, rows_in_group, slabs_of

_transpose = torch.ops.structmat.sparse_transpose.default


_Index = TypeVar("_Index", bound="SparseIndex")


class SparseIndex:
    """What :class:`SparsePattern` is, however it was made; see there."""

    shape: tuple[int, int]
    family: str
    group: int
    nnz: int
    seed: int | None
    starts: Tensor
    columns: Tensor
    _transposed: "tuple[Any, Tensor] | None"

    @classmethod
    def _of(
        cls: type[_Index],
        shape: tuple[int, int],
        family: str,
        starts: Tensor,
        columns: Tensor,
        nnz: int,
        seed: int | None = None,
    ) -> _Index:
        if nnz > 2**31 - 64:
            raise ValueError(f"SparsePattern: {nnz} entries, at most 2^31 - 64 work")
        made = object.__new__(cls)
        made.shape, made.family, made.nnz, made.seed = shape, family, nnz, seed
        made.group = rows_in_group(family, shape[0])
        made.starts, made.columns, made._transposed = starts, columns, None
        return made

    @property
    def density(self) -> float:
        places = self.shape[0] * self.shape[1]
        return self.nnz / places if places else 0.0

    @property
    def device(self) -> torch.device:
        return self.columns.device

    def to(self: _Index, device: torch.device | str) -> _Index:
        """The same pattern on a device, itself if it is there."""
        starts, columns = self.starts.to(device), self.columns.to(device)
        if columns is self.columns and starts is self.starts:
            return self
        made = self._of(self.shape, self.family, starts, columns, self.nnz, self.seed)
        if self._transposed is not None:
            pattern, permutation = self._transposed
            made._transposed = pattern.to(device), permutation.to(device)
        return made

    def transpose(self: _Index) -> tuple[_Index, Tensor]:
        """The support of the transposed matrix, ``n x m``, of family ``uniform``, and the int32
        permutation of values: value ``e`` of the transposed matrix is ``values[permutation[e]]``.

        Computed on the CPU at the first call, and kept: 6 bytes an entry.

        Example:
            >>> import torch, structmat as sm
            >>> pattern = sm.SparsePattern.random(5, 7, 0.5)
            >>> values = torch.randn(pattern.nnz)
            >>> other, permutation = pattern.transpose()
            >>> torch.equal(other.scatter(values[permutation]), pattern.scatter(values).T)
            True
        """
        if self._transposed is None:
            if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
                with torch.inference_mode(False):  # else autograd would refuse it later
                    return self.transpose()
            (m, n), device = self.shape, self.device
            host = "meta" if self.columns.is_meta else "cpu"
            starts, columns, permutation = _transpose(
                self.starts.to(host), self.columns.to(host), m, n, self.group, self.nnz
            )
            made = self._of((n, m), "uniform", starts.to(device), columns.to(device), self.nnz)
            self._transposed = made, permutation.to(device)
        return self._transposed

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where rows begin ``(m + 1,)``, and row and column of each entry ``(nnz,)``, int64.

        Example:
            >>> import torch, structmat as sm
            >>> sm.SparsePattern.from_columns(2, 4, torch.tensor([3])).coordinates()
            (tensor([0, 1, 2]), tensor([0, 1]), tensor([3, 3]))
        """
        (m, n), device = self.shape, self.device
        slabs = slabs_of(n)
        total = len(self.columns)
        slab = torch.arange(len(self.starts) - 1, device=device) % max(slabs, 1)
        slab = slab.repeat_interleave(self.starts.diff(), output_size=total)
        columns = slab * SLAB + self.columns.to(torch.int64)
        crow = torch.zeros(m + 1, dtype=torch.int64, device=device)
        if self.nnz == 0:
            return crow, crow[:0], crow[:0]
        first = self.starts[::slabs]
        rows = torch.arange(m, device=device)
        group = rows // self.group
        count = first.diff()[group]
        crow = torch.cat([crow[:1], count.cumsum(0)])
        row = rows.repeat_interleave(count, output_size=self.nnz)
        place = torch.arange(self.nnz, device=device) - (crow[:-1] - first[group])[row]
        return crow, row, columns[place]

    def _flat(self) -> Tensor:
        """Row-major positions of the entries, ascending."""
        _, row, column = self.coordinates()
        return row * self.shape[1] + column

    def gather(self, W: Tensor) -> Tensor:
        """The entries ``(nnz,)`` of a matrix ``(m, n)`` on the support. Differentiable.

        Raises:
            TypeError: no dense tensor.
            ValueError: another shape or device.
        """
        self._check("gather", "W", W, self.shape)
        return W.reshape(-1).index_select(0, self._flat())

    def scatter(self, values: Tensor) -> Tensor:
        """The dense matrix ``(m, n)`` with these values ``(nnz,)`` on the support, and zeros.
        Differentiable.

        Raises:
            TypeError: no dense tensor.
            ValueError: another number of values, or another device.
        """
        self._check("scatter", "values", values, (self.nnz,))
        m, n = self.shape
        return values.new_zeros(m * n).scatter(0, self._flat(), values).view(m, n)

    def to_csr(self, values: Tensor) -> Tensor:
        """The matrix as a torch CSR tensor, which shares the values.

        Raises:
            TypeError: no dense tensor.
            ValueError: another number of values, or another device.
        """
        self._check("to_csr", "values", values, (self.nnz,))
        crow, _, column = self.coordinates()
        return torch.sparse_csr_tensor(crow, column, values, self.shape, check_invariants=False)

    def to_mask(self) -> Tensor:
        """``(m, n)``, bool: true on the support."""
        return self.scatter(torch.ones(self.nnz, dtype=torch.bool, device=self.device))

    def _check(self, op: str, name: str, given: Any, shape: tuple[int, ...]) -> None:
        op = f"SparsePattern.{op}"
        if not isinstance(given, Tensor) or given.layout != torch.strided:
            raise TypeError(f"{op}: {name} must be a dense tensor, got {type(given).__name__}")
        if tuple(given.shape) != shape:
            raise ValueError(f"{op}: {name} is {tuple(given.shape)}, wanted {shape}")
        if given.device != self.device:
            raise ValueError(f"{op}: {name} is on {given.device}, the pattern on {self.device}")

    def __getstate__(self) -> dict[str, Any]:
        columns = self.columns.view(torch.uint8)  # pickle knows no uint16 of torch's
        return self.__dict__ | {"columns": columns, "_transposed": None}

    def __setstate__(self, given: dict[str, Any]) -> None:
        self.__dict__.update(given)
        self.columns = given["columns"].view(torch.uint16)

    def __eq__(self, other: object) -> bool:
        """Whether shape, family and support are the same, on any devices."""
        if not isinstance(other, SparseIndex):
            return NotImplemented
        if (self.shape, self.family, self.nnz) != (other.shape, other.family, other.nnz):
            return False
        other = other.to(self.device)
        return torch.equal(self.starts, other.starts) and torch.equal(
            self.columns.view(torch.int16), other.columns.view(torch.int16)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self.family, self.nnz))

    def __repr__(self) -> str:
        m, n = self.shape
        seed = "" if self.seed is None else f", seed={self.seed}"
        device = "" if self.device.type == "cpu" else f", device='{self.device}'"
        return (
            f"SparsePattern({m} x {n}, nnz={self.nnz}, density={self.density:.3g}, "
            f"family={self.family!r}{seed}{device})"
        )


@torch.library.register_fake("structmat::sparse_transpose")
def _(
    starts: Tensor, columns: Tensor, rows: int, cols: int, group: int, nnz: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        starts.new_empty((cols * slabs_of(rows) + 1,)),
        columns.new_empty((nnz,)),
        starts.new_empty((nnz,), dtype=torch.int32),
    )
