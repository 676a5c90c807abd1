# SPDX-License-Identifier: Apache-2.0
"""Structured linear layers for PyTorch, computed fast: low rank, sparse plus low rank, Monarch."""

from importlib.util import find_spec
from pathlib import Path

import torch

# find_spec, not __file__: an editable install keeps sources and binaries in different folders.
_spec = find_spec("structmat._ops")
if _spec is None or _spec.origin is None:
    raise ImportError("structmat was imported from its source folder; install it: pip install .")
torch.ops.load_library(_spec.origin)

# For CMake: -DCMAKE_PREFIX_PATH=$(structmat-config --cmake-prefix)
cmake_prefix_path = str(Path(_spec.origin).parent / "lib" / "cmake")

from . import kronecker_sparse, linalg, monarch, nn, ops, sparse_low_rank  # noqa: E402  (register the fakes of the operators just loaded)
from .compress import (  # noqa: E402
    CompressionReport,
    LayerReport,
    compress,
    load_pretrained,
    save_pretrained,
)
from .sparse_pattern import SparsePattern  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "CompressionReport",
    "LayerReport",
    "SparsePattern",
    "__version__",
    "cmake_prefix_path",
    "compress",
    "kronecker_sparse",
    "linalg",
    "load_pretrained",
    "monarch",
    "nn",
    "ops",
    "save_pretrained",
    "sparse_low_rank",
]
