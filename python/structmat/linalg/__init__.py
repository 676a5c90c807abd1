# SPDX-License-Identifier: Apache-2.0
"""Decompositions."""

from .random import gaussian
from .svd import SVDInfo, SVDResult, randomized_svd

__all__ = ["SVDInfo", "SVDResult", "gaussian", "randomized_svd"]
