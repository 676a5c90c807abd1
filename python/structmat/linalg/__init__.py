# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

from .random import gaussian
from .streaming_svd import StreamingSVD
from .svd import SVDInfo, SVDResult, randomized_svd

__all__ = ["SVDInfo", "SVDResult", "StreamingSVD", "gaussian", "randomized_svd"]
