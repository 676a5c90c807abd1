# SPDX-License-Identifier: Apache-2.0
"""How the families of sparse patterns choose: groups of rows, places among which each chooses."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.svd import check_integer

FAMILIES = ("uniform", "columns", "vector16", "block16")
SLAB = 4096  # csrc/include/structmat/sparse_pattern.h
STRIP = 16  # rows of vector16 and block16, columns of block16


def slabs_of(n: int) -> int:
    return -(-n // SLAB)


def rows_in_group(family: str, m: int) -> int:
    return {"uniform": 1, "columns": max(m, 1)}.get(family, STRIP)


def groups_of(family: str, m: int) -> int:
    return -(-m // rows_in_group(family, m))


def grid(op: str, m: int, n: int, family: str) -> tuple[int, int]:
    """Groups, and the places of each among which a family chooses."""
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(f"{op}: family is {family!r}, wanted one of {', '.join(FAMILIES)}")
    if family == "uniform":
        return 1, m * n
    return groups_of(family, m), n if family != "block16" else -(-n // STRIP)


def wanted_places(op: str, density: float, m: int, n: int, family: str) -> int:
    """How many places are chosen, over all groups together: see :func:`shares`.

    Of what ``shares`` makes possible, the number whose entries are nearest to ``density m n``.
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 <= density <= 1:
        raise ValueError(f"{op}: density is {density!r}, wanted 0 to 1")
    groups, places = grid(op, m, n, family)
    if family not in ("vector16", "block16"):
        return min(math.floor(density * places + 0.5), places)
    if density == 0 or m == 0 or n == 0:
        return 0
    least = math.floor(density * places)
    rows = (density * places - least) * m  # of the entries, those beyond the least in each strip
    more = min(math.floor(rows / STRIP + 0.5), groups)
    if m - rows <= abs(rows - STRIP * more):  # the last strip may be narrower
        more = groups
    return max(least * groups + more, 1)


def shares(groups: int, wanted: int) -> Tensor:
    """The places of each group ``(groups,)``: ``wanted / groups``, up for the first group and then
    as evenly as can be, else down. The last group, which may be narrower, is the last to go up."""
    if groups == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    least, more = divmod(wanted, groups)
    ends = -((torch.arange(groups + 1, device="cpu") * -more) // groups)
    return least + ends.diff()


def by_place(W: Tensor, family: str, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """What the entries of each place of a matrix ``(m, n)`` come to: ``(groups, places)``."""
    m, n = W.shape
    rows, width = rows_in_group(family, m), STRIP if family == "block16" else 1
    below, right = -m % rows, -n % width
    if below or right:
        W = torch.nn.functional.pad(W, (0, right, 0, below))
    groups, places = (m + below) // rows, (n + right) // width
    by_column = reduce(W.reshape(groups, rows, places * width), 1)
    return reduce(by_column.view(groups, places, width), 2)


def choose(
    choice: Callable[[int, Tensor], Tensor], groups: int, wanted: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Group and place of each of ``wanted`` places, ascending: ``choice`` tells the ``(len, k)``
    places of some groups for each of the one or two numbers ``k`` of :func:`shares`."""
    counts = shares(groups, wanted).to(device)
    begins = counts.cumsum(0) - counts
    group = torch.arange(groups, device=device).repeat_interleave(counts)
    place = torch.empty(len(group), dtype=torch.int64, device=device)
    for k in counts.unique().tolist():
        those = (counts == k).nonzero()[:, 0]
        place[begins[those][:, None] + torch.arange(k, device=device)] = choice(k, those)
    return group, place


def check_shape(op: str, m: int, n: int) -> None:
    check_integer("m", m, op)
    check_integer("n", n, op)
    if m < 0 or n < 0:
        raise ValueError(f"{op}: the shape is ({m}, {n}), wanted no negative size")


def check_columns(op: str, row: Tensor, columns: Tensor, n: int) -> None:
    """Raises unless columns are in range and ascend in each row."""
    if len(columns) == 0:
        return
    if int(columns.min()) < 0 or int(columns.max()) >= n:
        worst = int(columns.min()) if int(columns.min()) < 0 else int(columns.max())
        raise ValueError(f"{op}: column {worst} is out of range for {n} columns")
    step = columns.diff()[row.diff() == 0]
    if bool((step == 0).any()):
        raise ValueError(f"{op}: a column is given twice in a row")
    if bool((step < 0).any()):
        raise ValueError(f"{op}: the columns of a row must ascend")
