# SPDX-License-Identifier: Apache-2.0
"""When sparsity pays: the time of sm.ops.sparse_linear and sparse_low_rank_linear over that of a
dense layer, by density. A table, and the picture docs/sparse_low_rank.png (--tiny: in bench/out).

python bench/plot_sparse_low_rank.py [--panel [N ...]] [--tiny] [--out docs/sparse_low_rank.png]
float32, two threads, 4096 x 4096; a point is the ratio of medians of alternating runs. The law:
time over dense is d / d*, d* the density of equal times; dotted through the point at 10 %.
`--panel` measures these panels alone, or none, and draws the others as last measured (bench/out).
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import torch
from harness import OUT, measure, picture
from torch.nn.functional import linear

import structmat as sm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PANELS = (("uniform", 0), ("vector16", 0), ("uniform", 128))  # family, rank
DENSITIES = (0.005, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.8)
TOKENS = {1: ("C0", "o"), 16: ("C1", "s"), 1024: ("C2", "^")}
SIZE = 4096
POINTS = OUT / "plot_sparse_low_rank.json"


def points(family: str, rank: int, tiny: bool) -> list[dict[str, float]]:
    """Seconds of the layer and of the dense one at each density and number of tokens."""
    n = 64 if tiny else SIZE
    U, V = torch.randn(n, rank), torch.randn(rank, n) / n
    W, b = torch.randn(n, n) / n**0.5, torch.randn(n)
    found = []
    for density in DENSITIES:
        pattern = sm.SparsePattern.random(n, n, density, family=family)
        values = torch.randn(pattern.nnz)
        for tokens in (1, 3) if tiny else TOKENS:
            x = torch.randn(tokens, n)
            runs = {
                "ours": lambda x=x, pattern=pattern, values=values: (
                    sm.ops.sparse_low_rank_linear(x, U, V, pattern, values, b)
                    if rank
                    else sm.ops.sparse_linear(x, pattern, values, b)
                ),
                "dense": lambda x=x: linear(x, W, b),
            }
            with torch.no_grad():
                seconds = measure(runs, "cpu", budget=0.3, tiny=tiny, least=2)
            flops = 2 * tokens * pattern.nnz
            found.append({"density": density, "tokens": tokens, "flops": flops, **seconds})
    return found


def law(curve: list[dict[str, float]]) -> float:
    """d* from the point nearest to 10 %: d* = d (dense time) / (time)."""
    p = min(curve, key=lambda p: abs(p["density"] - 0.1))
    return p["density"] * p["dense"] / p["ours"]


def crossing(curve: list[dict[str, float]]) -> float:
    """The density at which the measured ratio is one, on a straight line between logarithms."""
    logs = [(math.log(p["density"]), math.log(p["ours"] / p["dense"])) for p in curve]
    for (d0, r0), (d1, r1) in pairwise(logs):
        if r0 <= 0 < r1:
            return math.exp(d0 - r0 * (d1 - d0) / (r1 - r0))
    return math.nan


def title(family: str, rank: int) -> str:
    return (
        f"sparse_linear, {family}" if not rank else f"sparse_low_rank_linear, {family}, r = {rank}"
    )


def draw(axis: Any, family: str, rank: int, found: list[dict[str, float]]) -> None:
    print(f"\n{title(family, rank)}: time over dense")
    densities = list(dict.fromkeys(p["density"] for p in found))
    print("tokens " + "".join(f"{100 * d:>8g} %" for d in densities) + "   equal at    law"
          "  GFLOP/s at 10 %, dense")  # fmt: skip
    curves = [
        [p for p in found if p["tokens"] == t] for t in dict.fromkeys(p["tokens"] for p in found)
    ]
    for curve, (color, mark) in zip(curves, TOKENS.values(), strict=False):
        tokens = curve[0]["tokens"]
        ratios = [p["ours"] / p["dense"] for p in curve]
        percent = [100 * p["density"] for p in curve]
        axis.plot(percent, ratios, color=color, marker=mark, label=f"T = {tokens}")
        if not rank:
            axis.plot(percent, [d / 100 / law(curve) for d in percent], color=color, ls=":")
        at = min(curve, key=lambda p: abs(p["density"] - 0.1))
        rates = at["flops"] / at["ours"] / 1e9, at["flops"] / at["density"] / at["dense"] / 1e9
        print(f"{tokens:6} " + "".join(f"{r:10.3f}" for r in ratios) + f"{crossing(curve):10.0%}"
              f"{law(curve):8.0%} {rates[0]:9.0f} {rates[1]:9.0f}")  # fmt: skip
    axis.axhline(1, color="0.5", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="density, %", title=title(family, rank))
    axis.set_xticks([0.5, 1, 2, 5, 10, 20, 50, 100])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--tiny", action="store_true", help="small sizes: does it run at all")
    options.add_argument("--panel", type=int, nargs="*", default=[0, 1, 2])
    options.add_argument("--out", type=Path, help="the picture")
    args = options.parse_args()
    torch.manual_seed(0)
    measured: dict[str, Any] = json.loads(POINTS.read_text()) if POINTS.exists() else {}
    for index, (family, rank) in enumerate(PANELS):
        if index in args.panel:
            measured[title(family, rank)] = points(family, rank, args.tiny)
    OUT.mkdir(exist_ok=True)
    if not args.tiny:
        POINTS.write_text(json.dumps(measured, indent=1) + "\n")
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained", sharey=True)
    for axis, (family, rank) in zip(axes, PANELS, strict=True):
        if title(family, rank) in measured:
            draw(axis, family, rank, measured[title(family, rank)])
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes[0].set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes[0].set(ylabel="time over dense")
    axes[0].yaxis.set_minor_formatter("")
    axes[0].plot([], [], color="0.3", ls=":", label="d / d*")
    axes[0].legend(loc="upper left")
    figure.savefig(picture(args, "sparse_low_rank.png"), dpi=110)


if __name__ == "__main__":
    main()
