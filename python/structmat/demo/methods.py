# SPDX-License-Identifier: Apache-2.0
"""What the demonstration compares."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """A way to compress, and how the report draws it."""

    label: str
    options: dict[str, Any]  # of sm.compress
    marker: str
    light: str  # its colour on a light page
    dark: str
    once: bool = False  # shown at one size
    every: int = 1  # one in so many batches calibrates it


#: The best last. Uniform ranks are nested: one file serves every smaller size. Monarch layers are
#: not, and their projection takes 20 s: they are shown at one size. So are sparse plus low-rank
#: ones, on every third batch: all of them and 40 iterations, the default, would take more than a
#: minute instead of half of one.
METHODS = {
    "svd": Method("plain SVD", {"method": "svd"}, "s", "#c2570c", "#fb923c"),
    "fisher": Method("Fisher SVD", {"method": "fisher"}, "^", "#7c3aed", "#b79bff"),
    "monarch": Method("Monarch", {"method": "monarch"}, "P", "#be185d", "#f472b6", once=True),
    "sparse": Method(
        "sparse + low rank, 8 steps",
        {"method": "sparse_low_rank", "iterations": 8},
        "X",
        "#6b7a1f",
        "#c3d15a",
        once=True,
        every=3,
    ),
    "whitened": Method("whitened, uniform", {"method": "whitened"}, "D", "#2563eb", "#6ea8ff"),
    "global": Method(
        "whitened, global", {"method": "whitened", "ranks": "global"}, "o", "#0d8a7f", "#2dd4bf"
    ),
}
