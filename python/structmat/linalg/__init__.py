# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

from .all_merge import all_merge
from .out_of_core import svd_out_of_core
from .random import gaussian
from .streaming_svd import StreamingSVD
from .svd import SVDInfo, SVDResult, randomized_svd

__all__ = [
    "SVDInfo",
    "SVDResult",
    "StreamingSVD",
    "all_merge",
    "gaussian",
    "randomized_svd",
    "svd_out_of_core",
]
