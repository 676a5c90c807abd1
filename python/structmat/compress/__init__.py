# SPDX-License-Identifier: Apache-2.0
"""Compression of whole models: ``structmat.compress`` and its report."""

from .checkpoint import load_pretrained, save_pretrained
from .compress import METHODS, RANKS, compress
from .report import CompressionReport, LayerReport

__all__ = [
    "METHODS",
    "RANKS",
    "CompressionReport",
    "LayerReport",
    "compress",
    "load_pretrained",
    "save_pretrained",
]
