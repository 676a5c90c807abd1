# SPDX-License-Identifier: Apache-2.0
"""Random matrices from a counter."""

import torch
from torch import Tensor


def gaussian(
    rows: int,
    cols: int,
    *,
    seed: int = 0,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A matrix of independent standard normal numbers that is the same on every machine.

    Entry ``(i, j)`` is a function of ``(seed, stream, i, j)`` alone: word ``j mod 4`` of Philox
    4x32-10 at counter ``(i, j div 4, stream)`` with key ``seed``, mapped by the normal quantile in
    correctly rounded operations. The CPU, any GPU and any number of threads write the same bits,
    and a larger matrix contains the smaller ones. torch's own generators are not touched.

    Args:
        rows, cols: the shape; either may be 0.
        seed: 0 to 2^63 - 1.
        stream: 0 to 2^32 - 1; the streams of a seed are independent.
        dtype: float32, or float64 for the float32 numbers widened.
        device: of the result; torch's default device if ``None``.

    Returns:
        ``(rows, cols)``. No entry is larger than 6.34 in magnitude.

    Raises:
        TypeError: another ``dtype``.
        ValueError: a negative size, a seed or stream out of range.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
    Giles, "Approximating the erfinv function", GPU Computing Gems, 2012.

    Example:
        >>> import structmat as sm
        >>> a, b = sm.linalg.gaussian(3, 2, seed=7), sm.linalg.gaussian(5, 4, seed=7)
        >>> bool((a == b[:3, :2]).all())
        True
    """
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gaussian: dtype must be float32 or float64, got {dtype}")
    if rows < 0 or cols < 0:
        raise ValueError(f"gaussian: the shape is ({rows}, {cols}), wanted no negative size")
    if not 0 <= seed < 2**63:
        raise ValueError(f"gaussian: seed is {seed}, wanted 0 to 2^63 - 1")
    if not 0 <= stream < 2**32:
        raise ValueError(f"gaussian: stream is {stream}, wanted 0 to 2^32 - 1")
    like = torch.empty(0, dtype=dtype, device=device)
    return torch.ops.structmat.gaussian.default(like, rows, cols, seed, stream)


@torch.library.register_fake("structmat::gaussian")
def _(like: Tensor, rows: int, cols: int, seed: int, stream: int) -> Tensor:
    return like.new_empty((rows, cols))
