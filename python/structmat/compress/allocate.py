# SPDX-License-Identifier: Apache-2.0
"""Ranks of all layers under one number of parameters."""

from collections.abc import Sequence


def parameters(m: int, n: int, rank: int | None) -> int:
    """Weights of a layer: ``rank (m + n)``, or ``m n`` where it stays dense (``None``)."""
    return m * n if rank is None else rank * (m + n)


def largest_rank(m: int, n: int) -> int:
    """The largest rank with fewer weights than the dense layer; zero where there is none."""
    return max(0, (m * n - 1) // (m + n))


def uniform_rank(m: int, n: int, keep: float) -> int | None:
    """``floor(keep m n / (m + n))``, at least one; ``None`` where that is no smaller than dense."""
    rank = max(1, int(keep * m * n / (m + n) * (1 + 1e-12)))
    return rank if rank <= largest_rank(m, n) else None


def global_ranks(
    shapes: Sequence[tuple[int, int]],
    losses: Sequence[Sequence[float]],
    budget: int,
    *,
    dense: bool = True,
) -> list[int | None]:
    """Ranks that minimise the summed loss with at most ``budget`` weights in all.

    Each layer may have any rank up to :func:`largest_rank` for which a loss is given or, with
    ``dense``, stay dense at loss zero; every layer has at least rank one. On the lower convex hull
    of its points (weights, loss) greedy choice by loss per weight is optimal up to the last step
    (Shoham, Gersho 1988).

    Args:
        shapes: ``(m, n)`` of each layer.
        losses: of each layer, the predicted loss at rank ``0, 1, ...``.
        budget: weights in all.
        dense: whether layers may stay dense (``None`` in the result).

    Raises:
        ValueError: not even rank one fits everywhere.
    """
    ranks: list[int | None] = []
    steps = []
    for index, ((m, n), loss) in enumerate(zip(shapes, losses, strict=True)):
        top = min(largest_rank(m, n), len(loss) - 1)
        ranks.append(1 if top else None)
        budget -= parameters(m, n, ranks[-1])
        if top:
            points = [(r * (m + n), loss[r]) for r in range(1, top + 1)]
            points += [(m * n, 0.0)] if dense else []
            steps += [(-slope, index, order) for order, slope in enumerate(_hull(points))]
    if budget < 0:
        raise ValueError(
            "compress: keep is too small for rank one in every layer; leave layers out"
        )
    # A layer's steps come in descending order of gain; the index makes ties the same everywhere.
    closed = set()
    for _, index, _ in sorted(steps):
        m, n = shapes[index]
        rank = ranks[index]
        if index in closed or rank is None:
            continue
        top = min(largest_rank(m, n), len(losses[index]) - 1)
        cost = m + n if rank < top else m * n - rank * (m + n)  # the last step: to dense
        if cost <= budget:
            ranks[index] = rank + 1 if rank < top else None
            budget -= cost
        else:
            closed.add(index)
    return ranks


def _hull(points: list[tuple[int, float]]) -> list[float]:
    """Loss saved per weight by each step between neighbours, on the lower convex hull."""
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _saved(hull[-2], hull[-1]) <= _saved(hull[-1], point):
            hull.pop()
        hull.append(point)
    slopes = []
    corner = 1
    for point in points[1:]:
        if point[0] > hull[corner][0]:
            corner += 1
        slopes.append(_saved(hull[corner - 1], hull[corner]))
    return slopes


def _saved(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])
