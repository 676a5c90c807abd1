# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

from .gram_matmul import gram_matmul
from .orthonormalize import orthonormalize
from .random import gaussian
from .range_step import RangeStep, range_step
from .streaming_svd import StreamingSVD
from .svd import SVDInfo, SVDResult, randomized_svd
from .svd_tail import svd_tail

__all__ = [
    "RangeStep",
    "SVDInfo",
    "SVDResult",
    "StreamingSVD",
    "gaussian",
    "gram_matmul",
    "orthonormalize",
    "randomized_svd",
    "range_step",
    "svd_tail",
]
