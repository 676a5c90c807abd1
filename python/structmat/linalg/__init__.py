# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

from .all_merge import all_merge
from .gram_matmul import GramMoments, gram_matmul
from .orthonormalize import orthonormalize
from .out_of_core import svd_out_of_core
from .random import gaussian
from .range_step import RangeStep, range_step
from .streaming_svd import StreamingSVD
from .svd import SVDInfo, SVDResult, randomized_svd
from .svd_tail import svd_tail

__all__ = [
    "GramMoments",
    "RangeStep",
    "SVDInfo",
    "SVDResult",
    "StreamingSVD",
    "all_merge",
    "gaussian",
    "gram_matmul",
    "orthonormalize",
    "randomized_svd",
    "range_step",
    "svd_out_of_core",
    "svd_tail",
]
