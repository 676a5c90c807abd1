# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

from .gram_matmul import gram_matmul
from .orthonormalize import orthonormalize
from .random import gaussian
from .streaming_svd import StreamingSVD
from .svd import SVDInfo, SVDResult, randomized_svd

__all__ = [
    "SVDInfo",
    "SVDResult",
    "StreamingSVD",
    "gaussian",
    "gram_matmul",
    "orthonormalize",
    "randomized_svd",
]
