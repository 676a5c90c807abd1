# SPDX-License-Identifier: Apache-2.0
"""The places of a family that have the largest scores, as masks ``(groups, places)``."""

import math

import torch
from torch import Tensor

from .families import STRIP, by_place, rows_in_group, shares

_SAMPLE = 1 << 14


def best(scores: Tensor, wanted: int, family: str) -> Tensor:
    """Where the sum of scores ``(m, n)`` is largest; of equal sums those of lower index."""
    if family == "uniform":
        return largest(scores.reshape(1, -1), wanted)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sums = by_place(wide, family, torch.sum)
    counts = shares(len(sums), wanted).to(sums.device)
    numbers = counts.unique().tolist()
    if len(numbers) == 1:
        return largest(sums, numbers[0])
    chosen = torch.zeros_like(sums, dtype=torch.bool)
    for k in numbers:
        those = counts == k
        chosen[those] = largest(sums[those], k)
    return chosen


def covered(chosen: Tensor, m: int, n: int, family: str) -> Tensor:
    """The entries of these places: a mask ``(m, n)``."""
    if family == "uniform":
        return chosen.view(m, n)
    if family == "block16":
        chosen = chosen.repeat_interleave(STRIP, 1)[:, :n]
    return chosen[:, None].expand(-1, rows_in_group(family, m), -1).reshape(-1, n)[:m]


def largest(scores: Tensor, wanted: int) -> Tensor:
    """The largest of each row; of equals, the first."""
    groups, places = scores.shape
    if wanted in (0, places):
        return torch.full_like(scores, wanted > 0, dtype=torch.bool)
    if groups == 1:
        return _largest_of(scores[0], wanted)[None]
    least = scores.kthvalue(places - wanted + 1, dim=1, keepdim=True).values
    above, equal = scores > least, scores == least
    room = wanted - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def _largest_of(scores: Tensor, wanted: int) -> Tensor:
    """Of one row, which may be long: a sample tells between which numbers the least of them lies,
    and only what lies there is sorted. For 3 % of 16.8 million float32 numbers two cores take 30 ms
    instead of 240."""
    above, between = 0, scores
    if len(scores) > 8 * _SAMPLE:
        sample = scores[:: len(scores) // _SAMPLE | 1].sort(descending=True).values
        share = wanted / len(scores) * len(sample)
        slack = 4 * math.sqrt(share) + 8
        low = float(sample[int(share + slack)]) if share + slack < len(sample) else 0.0
        high = float(sample[int(share - slack)]) if share > slack else math.inf
        more = int((scores > high).count_nonzero())
        inside = (scores >= low) & (scores <= high)
        if more < wanted <= more + int(inside.count_nonzero()):  # else it was no fair sample
            above, between = more, scores[inside]
    least = between.kthvalue(len(between) - (wanted - above) + 1).values
    chosen = scores >= least
    extra = int(chosen.count_nonzero()) - wanted
    if extra > 0:
        equal = (scores == least).nonzero()[:, 0]
        chosen[equal[len(equal) - extra :]] = False
    return chosen
