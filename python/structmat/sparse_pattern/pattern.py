# SPDX-License-Identifier: Apache-2.0
"""Which entries of a sparse matrix may differ from zero."""

import math

import torch
from torch import Tensor

from ..linalg.svd import check_integer
from . import state
from .families import (
    SLAB,
    STRIP,
    by_place,
    check_columns,
    check_shape,
    choose,
    grid,
    groups_of,
    rows_in_group,
    slabs_of,
    wanted_places,
)
from .index import SparseIndex
from .selection import best

_random_subsets = torch.ops.structmat.random_subsets.default


class SparsePattern(SparseIndex):
    """The support of a sparse ``m x n`` matrix, fixed while its values change.

    Values belong to a pattern as a vector ``(nnz,)`` in the order of CSR: row by row, ascending
    columns. :meth:`gather` reads them from a matrix, :meth:`scatter` writes one.

    Four families, from the freest to those that hardware likes best:

    - ``"uniform"``: any entries.
    - ``"block16"``: blocks of 16 x 16 in strips of 16 rows.
    - ``"vector16"``: entries of 16 rows in one column, in strips of 16 rows.
    - ``"columns"``: whole columns.

    The last strip and the last block may be narrower. Patterns are made by :meth:`random`,
    :meth:`from_mask`, :meth:`from_csr`, :meth:`from_columns` and :meth:`from_scores`.

    Attributes:
        shape: ``(m, n)``.
        nnz: the number of entries, at most 2^31 - 64.
        family: one of the four.
        density: ``nnz / (m n)``, 0 for an empty matrix.
        seed: that of :meth:`random`, else ``None``.
        device: where the index lies.
        starts, columns: the index as the operators read it. Rows in groups of ``group`` (1, 16 or
            ``m``) share their columns; columns are cut into slabs of 4,096. Those of group ``g`` in
            slab ``s`` are ``4096 s + columns[e]`` for ``starts[g slabs + s] <= e < starts[g slabs +
            s + 1]``, as uint16.

    Memory: 2 bytes an entry for ``uniform``, 2 bytes for 16 entries for the strips, 2 bytes a
    column for ``columns``, and 8 bytes for each group and slab. The transpose, computed at the
    first gradient by ``x``, takes 6 bytes an entry.

    Example:
        >>> import torch, structmat as sm
        >>> pattern = sm.SparsePattern.random(64, 128, 0.05, family="vector16", seed=1)
        >>> pattern
        SparsePattern(64 x 128, nnz=416, density=0.0508, family='vector16', seed=1)
        >>> W = torch.randn(64, 128)
        >>> values = pattern.gather(W)
        >>> torch.equal(pattern.scatter(values), W * pattern.to_mask())
        True
    """

    def __init__(self) -> None:
        raise TypeError(
            "SparsePattern: use SparsePattern.random, from_mask, from_csr, from_columns or "
            "from_scores"
        )

    @classmethod
    def random(
        cls,
        m: int,
        n: int,
        density: float,
        *,
        family: str = "uniform",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> "SparsePattern":
        """A random support that is the same on every machine.

        ``uniform`` has ``round(density m n)`` entries, ``columns`` the same ``round(density n)``
        columns in all rows. ``vector16`` has ``q = density n`` columns in each strip of 16 rows,
        ``block16`` ``q = density B`` of its ``B = ceil(n / 16)`` blocks, rounded up or down so that
        all strips together have nearest to ``density m n`` entries (a narrower last block counted
        as its share): up in evenly spread strips from the first, in a narrower last strip only
        where all go up. There is at least one vector or block unless the density is 0. All choices
        of a strip are equally likely, and strips are independent. The numbers come from a counter
        (Philox 4x32-10), the same for any number of threads.

        Args:
            m, n: the shape; either may be 0.
            density: 0 to 1.
            family: ``"uniform"``, ``"columns"``, ``"vector16"`` or ``"block16"``.
            seed: 0 to 2^63 - 1.
            device: of the index; it is drawn on the CPU.

        Raises:
            TypeError: a size or the seed is no integer.
            ValueError: a negative size, an unknown family, a density or seed out of range, or more
                than 2^31 - 64 entries.

        Cost: a 64-bit number for every place, of which the smallest are taken; 0.14 s for 3 % of
        4,096 x 4,096 on one core.

        Example:
            >>> import structmat as sm
            >>> sm.SparsePattern.random(1000, 1000, 0.03).nnz
            30000
        """
        op = "SparsePattern.random"
        check_shape(op, m, n)
        wanted = wanted_places(op, density, m, n, family)
        check_integer("seed", seed, op)
        if not 0 <= seed < 2**63:
            raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")
        # Else it counts whether the last block, which is narrower, is among the chosen.
        known = family != "block16" or n % STRIP == 0
        if known and torch.empty(0, device=device).is_meta:
            return cls._on_meta(m, n, family, wanted, seed)
        made = cls._drawn(m, n, family, wanted, seed)
        return made.to(torch.empty(0, device=device).device)

    @classmethod
    def _drawn(cls, m: int, n: int, family: str, wanted: int, seed: int) -> "SparsePattern":
        groups, places = grid("SparsePattern", m, n, family)
        like = torch.empty(0, dtype=torch.int64, device="cpu")

        def choice(k: int, those: Tensor) -> Tensor:
            chosen: Tensor = _random_subsets(like, groups, places, k, seed)
            return chosen[those]

        made = cls._from_choice(m, n, family, *choose(choice, groups, wanted, like.device))
        made.seed = seed
        return made

    @classmethod
    def _on_meta(cls, m: int, n: int, family: str, wanted: int, seed: int) -> "SparsePattern":
        """Sizes without places, for layers on the meta device."""
        groups, rows = groups_of(family, m), rows_in_group(family, m)
        count = wanted * (STRIP if family == "block16" else 1)
        nnz = count
        if family != "uniform" and groups:  # a narrower last strip never has one more
            width = STRIP if family == "block16" else 1
            nnz = (wanted // groups * m + wanted % groups * rows) * width
        starts = torch.empty(groups * slabs_of(n) + 1, dtype=torch.int64, device="meta")
        columns = torch.empty(count, dtype=torch.uint16, device="meta")
        return cls._of((m, n), family, starts, columns, nnz, seed)

    @classmethod
    def _from_choice(
        cls, m: int, n: int, family: str, group: Tensor, place: Tensor
    ) -> "SparsePattern":
        """The pattern of chosen places of groups of :func:`grid`, ascending."""
        column = place
        if family == "uniform":
            group, column = place // max(n, 1), place % max(n, 1)
        elif family == "block16":
            column = place[:, None] * STRIP + torch.arange(STRIP, device=place.device)
            group, column = group.repeat_interleave(STRIP), column.flatten()
            inside = column < n  # the last block may be narrower
            group, column = group[inside], column[inside]
        return cls._from_columns(m, n, family, group, column)

    @classmethod
    def _from_chosen(cls, m: int, n: int, family: str, chosen: Tensor) -> "SparsePattern":
        """The pattern of a mask ``(groups, places)``."""
        if family == "uniform":
            return cls._from_columns(m, n, family, *chosen.view(m, n).nonzero(as_tuple=True))
        return cls._from_choice(m, n, family, *chosen.nonzero(as_tuple=True))

    @classmethod
    def _from_columns(
        cls, m: int, n: int, family: str, group: Tensor, column: Tensor
    ) -> "SparsePattern":
        """From the columns of the groups, sorted by both."""
        slabs, groups = slabs_of(n), groups_of(family, m)
        counts = torch.bincount(group * slabs + column // SLAB, minlength=groups * slabs)
        starts = torch.zeros(groups * slabs + 1, dtype=torch.int64, device=column.device)
        torch.cumsum(counts, 0, out=starts[1:])
        rows = rows_in_group(family, m)
        nnz = rows * len(column)
        if groups and m % rows:  # the last group has fewer rows
            nnz -= (rows - m % rows) * int(starts[-1] - starts[(groups - 1) * slabs])
        return cls._of((m, n), family, starts, (column % SLAB).to(torch.uint16), nnz)

    @classmethod
    def from_mask(cls, mask: Tensor, *, family: str = "uniform") -> "SparsePattern":
        """The support of the true entries of a matrix.

        Args:
            mask: ``(m, n)``, bool.
            family: what the pattern is to be; ``uniform`` takes any mask.

        Raises:
            TypeError: no bool tensor.
            ValueError: not two dimensions, or a mask that is not of the family.

        Example:
            >>> import torch, structmat as sm
            >>> sm.SparsePattern.from_mask(torch.eye(3, dtype=torch.bool)).nnz
            3
        """
        op = "SparsePattern.from_mask"
        if not isinstance(mask, Tensor) or mask.layout != torch.strided:
            raise TypeError(f"{op}: mask must be a dense tensor, got {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"{op}: mask is {mask.dtype}, wanted torch.bool")
        if mask.dim() != 2:
            raise ValueError(f"{op}: mask must have 2 dimensions, got {mask.dim()}")
        m, n = mask.shape
        grid(op, m, n, family)  # for its errors
        chosen = mask.reshape(1, -1) if family == "uniform" else by_place(mask, family, torch.any)
        made = cls._from_chosen(m, n, family, chosen)
        if made.nnz != int(mask.sum()):
            raise ValueError(
                f"{op}: the mask is no pattern of family {family!r}: it has {int(mask.sum())} "
                f"entries, the least {family} pattern around them {made.nnz}"
            )
        return made

    @classmethod
    def from_csr(
        cls,
        crow: Tensor,
        columns: Tensor | None = None,
        shape: tuple[int, int] | None = None,
    ) -> "SparsePattern":
        """The support of a matrix in CSR, of family ``uniform``; the order of values is the same.

        Args:
            crow: ``(m + 1,)``, where rows begin; or a CSR tensor, alone, whose stored entries count
                even where they are zero.
            columns: ``(nnz,)``, ascending in each row. Both are of an integer type.
            shape: ``(m, n)``.

        Raises:
            TypeError: anything else than integer tensors, or a tensor of another layout.
            ValueError: sizes that do not fit, or columns that repeat, descend or are out of range.

        Example:
            >>> import torch, structmat as sm
            >>> crow, columns = torch.tensor([0, 1, 3]), torch.tensor([1, 0, 1])
            >>> pattern = sm.SparsePattern.from_csr(crow, columns, (2, 2))
            >>> pattern.scatter(torch.tensor([1.0, 2.0, 3.0]))
            tensor([[0., 1.],
                    [2., 3.]])
        """
        op = "SparsePattern.from_csr"
        if isinstance(crow, Tensor) and crow.layout == torch.sparse_csr:
            if columns is not None or shape is not None:
                raise TypeError(f"{op}: a CSR tensor is given alone")
            shape = crow.shape[0], crow.shape[1]
            crow, columns = crow.crow_indices(), crow.col_indices()
        if columns is None or shape is None:
            raise TypeError(f"{op}: wanted a CSR tensor, or crow, columns and shape")
        for name, index in {"crow": crow, "columns": columns}.items():
            if not isinstance(index, Tensor) or index.layout != torch.strided:
                raise TypeError(f"{op}: {name} must be a dense tensor, got {type(index).__name__}")
            if index.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{op}: {name} is {index.dtype}, wanted torch.int32 or torch.int64")
        if not isinstance(shape, tuple | list):
            raise TypeError(f"{op}: shape is {shape!r}, wanted (m, n)")
        if len(shape) != 2:
            raise ValueError(f"{op}: shape is {tuple(shape)}, wanted (m, n)")
        m, n = shape
        check_shape(op, m, n)
        if crow.device != columns.device:
            raise ValueError(f"{op}: columns is on {columns.device}, crow on {crow.device}")
        if crow.shape != (m + 1,) or columns.dim() != 1:
            raise ValueError(
                f"{op}: crow is {tuple(crow.shape)} and columns {tuple(columns.shape)}, wanted "
                f"({m + 1},) and (nnz,)"
            )
        crow, columns = crow.long(), columns.long()
        counts = crow.diff()
        if int(crow[0]) != 0 or int(crow[-1]) != len(columns) or bool((counts < 0).any()):
            raise ValueError(f"{op}: crow must ascend from 0 to nnz = {len(columns)}")
        row = torch.arange(m, device=crow.device).repeat_interleave(
            counts, output_size=len(columns)
        )
        check_columns(op, row, columns, n)
        return cls._from_columns(m, n, "uniform", row, columns)

    @classmethod
    def from_columns(cls, m: int, n: int, columns: Tensor) -> "SparsePattern":
        """Whole columns, of family ``columns``.

        Args:
            m, n: the shape.
            columns: ``(k,)``, ascending, of an integer type.

        Raises:
            TypeError: no integer tensor.
            ValueError: columns that repeat, descend or are out of range.

        Example:
            >>> import torch, structmat as sm
            >>> sm.SparsePattern.from_columns(2, 4, torch.tensor([1, 3])).to_mask().int()
            tensor([[0, 1, 0, 1],
                    [0, 1, 0, 1]], dtype=torch.int32)
        """
        op = "SparsePattern.from_columns"
        check_shape(op, m, n)
        if not isinstance(columns, Tensor) or columns.dtype not in (torch.int32, torch.int64):
            kind = columns.dtype if isinstance(columns, Tensor) else type(columns).__name__
            raise TypeError(f"{op}: columns is {kind}, wanted torch.int32 or torch.int64")
        if columns.dim() != 1:
            raise ValueError(f"{op}: columns must have 1 dimension, got {columns.dim()}")
        columns = columns.long()
        group = torch.zeros_like(columns)
        check_columns(op, group, columns, n)
        kept = slice(None) if m else slice(0)
        return cls._from_columns(m, n, "columns", group[kept], columns[kept])

    @classmethod
    def from_scores(
        cls, scores: Tensor, density: float, *, family: str = "uniform"
    ) -> "SparsePattern":
        """The support with the largest sum of scores that a family and a density allow.

        With the squares of a matrix as scores it is the nearest sparse matrix. The number of
        entries is that of :meth:`random`; of equal scores those of lower index are taken.

        Args:
            scores: ``(m, n)``, real, not below zero.
            density, family: as for :meth:`random`.

        Raises:
            TypeError: no floating tensor.
            ValueError: not two dimensions, NaN, Inf or negative numbers among the scores, an
                unknown family or a density out of range.

        Cost: a few passes over the scores. Beside them ``uniform`` takes some 5 bytes for each of
        the ``m n`` places at a density of 3 % and 15 at 30 % while it runs (masks, and the places
        chosen, 8 bytes each), the strips the sums of their places.

        Example:
            >>> import torch, structmat as sm
            >>> W = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
            >>> sm.SparsePattern.from_scores(W.square(), 0.5, family="columns").to_mask()
            tensor([[False,  True],
                    [False,  True]])
        """
        op = "SparsePattern.from_scores"
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise TypeError(f"{op}: scores must be a floating tensor, got {kind}")
        if scores.dim() != 2:
            raise ValueError(f"{op}: scores must have 2 dimensions, got {scores.dim()}")
        m, n = scores.shape
        wanted = wanted_places(op, density, m, n, family)
        scores = scores.detach()
        if scores.numel() and not (float(scores.min()) >= 0 and float(scores.max()) < math.inf):
            raise ValueError(f"{op}: scores must be finite and not negative")
        return cls._from_chosen(m, n, family, best(scores, wanted, family))

    def state_dict(self, *, indices: bool = False) -> dict[str, Tensor]:
        """Tensors that :meth:`from_state_dict` makes the same pattern of; safetensors takes them.

        A pattern made by :meth:`random` is held as its family, size and seed, 56 bytes, with a
        checksum of the index; any other one, or any with ``indices=True``, as its index.

        Example:
            >>> import structmat as sm
            >>> pattern = sm.SparsePattern.random(64, 64, 0.1, seed=3)
            >>> state = pattern.state_dict()
            >>> list(state), sm.SparsePattern.from_state_dict(state) == pattern
            (['drawn'], True)
        """
        return state.save(self, indices)

    @classmethod
    def from_state_dict(
        cls, given: dict[str, Tensor], *, device: torch.device | str | None = None
    ) -> "SparsePattern":
        """The pattern of a :meth:`state_dict`.

        Args:
            given: as :meth:`state_dict` made it.
            device: of the index; that of the tensors if ``None``.

        Raises:
            TypeError: tensors of other types.
            ValueError: missing tensors, an index that is no pattern, or one drawn anew that is not
                the one that was saved.
        """
        return state.load(cls, given, device)


@torch.library.register_fake("structmat::random_subsets")
def _(like: Tensor, groups: int, count: int, per_group: int, seed: int) -> Tensor:
    return like.new_empty((groups, per_group))
