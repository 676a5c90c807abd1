# SPDX-License-Identifier: Apache-2.0
"""Sparse patterns as tensors in files, and back, with all checks."""

import zlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .families import (
    FAMILIES,
    SLAB,
    STRIP,
    check_columns,
    check_shape,
    grid,
    groups_of,
    slabs_of,
)

if TYPE_CHECKING:
    from .pattern import SparsePattern

_OP = "SparsePattern.from_state_dict"


def save(pattern: "SparsePattern", indices: bool) -> dict[str, Tensor]:
    (m, n), family = pattern.shape, FAMILIES.index(pattern.family)
    if pattern.seed is None or indices:
        shape = torch.tensor([m, n, family], dtype=torch.int64)
        return {"shape": shape, "starts": pattern.starts, "columns": pattern.columns}
    facts = [m, n, family, _places(pattern), pattern.seed, pattern.nnz, _checksum(pattern)]
    return {"drawn": torch.tensor(facts, dtype=torch.int64)}


def load(
    cls: "type[SparsePattern]", given: dict[str, Tensor], device: torch.device | str | None
) -> "SparsePattern":
    if not isinstance(given, dict) or not all(isinstance(a, Tensor) for a in given.values()):
        raise TypeError(f"{_OP}: wanted a dictionary of tensors, got {type(given).__name__}")
    if "drawn" in given:
        m, n, code, wanted, seed, nnz, checksum = _numbers("drawn", given["drawn"], 7)
        family = _family(code)
        groups, places = grid(_OP, m, n, family)
        if not 0 <= wanted <= groups * places or seed < 0:
            raise ValueError(f"{_OP}: {wanted} of {groups * places} places, drawn from seed {seed}")
        made = cls._drawn(m, n, family, wanted, seed)
        if made.nnz != nnz or _checksum(made) != checksum:
            raise ValueError(f"{_OP}: the pattern drawn from seed {seed} is not the saved one")
        return made.to(given["drawn"].device if device is None else device)
    missing = {"shape", "starts", "columns"} - given.keys()
    if missing:
        raise ValueError(f"{_OP}: {', '.join(sorted(missing))} missing")
    m, n, code = _numbers("shape", given["shape"], 3)
    made = from_index(cls, _OP, m, n, _family(code), given["starts"], given["columns"])
    return made if device is None else made.to(device)


def from_index(
    cls: "type[SparsePattern]",
    op: str,
    m: int,
    n: int,
    family: str,
    starts: Tensor,
    columns: Tensor,
) -> "SparsePattern":
    """A pattern around an index that may come from anywhere."""
    check_shape(op, m, n)
    grid(op, m, n, family)
    slabs, groups = slabs_of(n), groups_of(family, m)
    if starts.dtype != torch.int64 or columns.dtype != torch.uint16:
        raise TypeError(
            f"{op}: starts is {starts.dtype} and columns {columns.dtype}, wanted torch.int64 and "
            "torch.uint16"
        )
    if starts.shape != (groups * slabs + 1,) or columns.dim() != 1:
        raise ValueError(
            f"{op}: starts is {tuple(starts.shape)} and columns {tuple(columns.shape)}, wanted "
            f"({groups * slabs + 1},) and one dimension"
        )
    counts = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != len(columns) or bool((counts < 0).any()):
        raise ValueError(f"{op}: starts must ascend from 0 to {len(columns)}")
    cell = torch.arange(groups * slabs, device=starts.device)
    cell = cell.repeat_interleave(counts, output_size=len(columns))
    place = columns.to(torch.int64)
    check_columns(op, cell, place, SLAB)
    group, column = cell // max(slabs, 1), cell % max(slabs, 1) * SLAB + place
    check_columns(op, group, column, n)
    if family == "block16":
        blocks = -(-n // STRIP)
        width = torch.bincount(group * blocks + column // STRIP, minlength=groups * blocks)
        full = torch.full((blocks,), STRIP, device=starts.device)
        full[n // STRIP :] = n % STRIP
        if bool(((width != 0) & (width != full.repeat(groups))).any()):
            raise ValueError(f"{op}: a block lacks columns")
    return cls._from_columns(m, n, family, group, column)


def _numbers(name: str, facts: Tensor, count: int) -> list[int]:
    if facts.dtype != torch.int64 or facts.shape != (count,):
        raise ValueError(f"{_OP}: {name} must be {count} numbers of int64")
    numbers: list[int] = facts.tolist()
    check_shape(_OP, *numbers[:2])
    return numbers


def _family(code: int) -> str:
    if not 0 <= code < len(FAMILIES):
        raise ValueError(f"{_OP}: there is no family {code}")
    return FAMILIES[code]


def _places(pattern: "SparsePattern") -> int:
    """How many places all groups of a drawn pattern have chosen."""
    if pattern.family != "block16" or pattern.nnz == 0:
        return len(pattern.columns)
    columns = pattern.starts[:: slabs_of(pattern.shape[1])].diff()
    return int(((columns + STRIP - 1) // STRIP).sum())  # only the last may be narrower


def _checksum(pattern: "SparsePattern") -> int:
    starts, columns = (t.cpu().contiguous().numpy() for t in (pattern.starts, pattern.columns))
    return zlib.crc32(columns.tobytes(), zlib.crc32(starts.tobytes()))
