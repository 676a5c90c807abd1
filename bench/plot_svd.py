# SPDX-License-Identifier: Apache-2.0
"""Pictures of the randomized SVD against torch.svd_lowrank and scikit-learn's randomized_svd.

python bench/plot_svd.py [--tiny] [--out docs/svd.png]   (--tiny: bench/out/svd.png)
Left: excess error against time as passes grow, 2048 x 2048, rank 64. Middle: time against rank,
2048 x 2048. Right: time against size, rank 64. Singular values i^-1/2, float32, two threads; each
point is the median of alternating runs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from bench_svd import Factors, matrix
from harness import measure, picture
from sklearn.utils.extmath import randomized_svd

import structmat as sm

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Contender = Callable[[], Factors]
MILLISECONDS = [m * 10**e for e in range(5) for m in (1, 2, 5)]
STYLE = {"structmat": ("C0", "o"), "torch": ("C1", "s"), "scikit-learn": ("C2", "^")}


def ours(A: torch.Tensor, k: int, sweeps: int | None = None) -> Contender:
    return lambda: tuple(sm.linalg.randomized_svd(A, k, sweeps=sweeps))


def torchs(A: torch.Tensor, k: int, niter: int = 2) -> Contender:
    def run() -> Factors:
        U, S, V = torch.svd_lowrank(A, q=k + 10, niter=niter)
        return U[:, :k], S[:k], V[:, :k].T

    return run


def sklearns(A: torch.Tensor, k: int, n_iter: Any = "auto") -> Contender:
    def run() -> Factors:
        U, S, Vh = randomized_svd(A.numpy(), k, n_iter=n_iter, random_state=0)
        return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh)

    return run


def plain(axis: Any, values: list[int]) -> None:
    """Marks at some of the values on a logarithmic axis, in plain numbers."""
    low, high = axis.get_view_interval()
    axis.set_ticks([v for v in values if low <= v <= high])
    axis.set_major_formatter("{x:.0f}")
    axis.set_minor_formatter("")


def timed(contenders: dict[str, Contender], tiny: bool) -> dict[str, float]:
    return measure(contenders, "cpu", budget=2, tiny=tiny, settle=0.1)


def pareto(axis: Any, n: int, k: int, tiny: bool) -> None:
    A = matrix(n, n, "cpu")
    best = float((1 / torch.arange(k + 1, n + 1, dtype=torch.float64)).sum().sqrt())
    runs = {("structmat", s): ours(A, k, s) for s in (2, 3, 4, 5, 6, 7)}
    runs[("structmat", 0)] = ours(A, k)
    runs |= {("torch", i): torchs(A, k, i) for i in (0, 1, 2, 3)}
    runs |= {("scikit-learn", i): sklearns(A, k, i) for i in (0, 1, 2, 4)}
    seconds = timed({str(key): run for key, run in runs.items()}, tiny)
    for name, (color, mark) in STYLE.items():
        points = []
        for key, run in runs.items():
            if key[0] != name:
                continue
            U, S, Vh = run()
            excess = float((A - (U * S) @ Vh).double().norm()) / best - 1
            point = (1e3 * seconds[str(key)], excess)
            if key == ("structmat", 0):
                axis.plot(*point, color=color, marker="*", markersize=14)
                axis.annotate("default", point, (6, 6), textcoords="offset points")
            else:
                points.append(point)
        axis.plot(*zip(*points, strict=True), color=color, marker=mark, label=name)
    axis.set(xscale="log", yscale="log", xlabel="time, ms", ylabel="excess error")
    plain(axis.xaxis, MILLISECONDS)
    axis.set_title(f"{n} x {n}, rank {k}, more passes")
    axis.legend(loc="upper right")


def against(axis: Any, cases: list[tuple[int, int, int]], label: str, tiny: bool) -> None:
    """cases: what stands on the axis, size, rank."""
    times: dict[str, list[float]] = {name: [] for name in STYLE}
    for _, n, k in cases:
        A = matrix(n, n, "cpu")
        runs = {"structmat": ours(A, k), "torch": torchs(A, k), "scikit-learn": sklearns(A, k)}
        for name, seconds in timed(runs, tiny).items():
            times[name].append(1e3 * seconds)
    for name, (color, mark) in STYLE.items():
        axis.plot([case[0] for case in cases], times[name], color=color, marker=mark, label=name)
    axis.set(xscale="log", yscale="log", xlabel=label, ylabel="time, ms")
    plain(axis.xaxis, [case[0] for case in cases])
    plain(axis.yaxis, MILLISECONDS)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tiny", action="store_true", help="small sizes: does it run at all")
    options.add_argument("--out", type=Path, help="the picture")
    args = options.parse_args()
    torch.manual_seed(0)
    n, k = (60, 6) if args.tiny else (2048, 64)
    ranks = (4, 8) if args.tiny else (16, 32, 64, 128, 256)
    sizes = (40, 60) if args.tiny else (512, 1024, 2048, 4096)
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    pareto(axes[0], n, k, args.tiny)
    against(axes[1], [(r, n, r) for r in ranks], "rank", args.tiny)
    axes[1].set_title(f"{n} x {n}, defaults")
    against(axes[2], [(s, s, k) for s in sizes], "size", args.tiny)
    axes[2].set_title(f"rank {k}, defaults")
    figure.savefig(picture(args, "svd.png"), dpi=110)


if __name__ == "__main__":
    main()
