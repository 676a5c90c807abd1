# SPDX-License-Identifier: Apache-2.0
"""Truncated SVD: sm.linalg.randomized_svd against what a user would pick instead.

python bench/bench_svd.py [--device cuda] [--tiny] [--json FILE]
Singular values i^-1/2. "excess" is the relative Frobenius error over the least possible, minus 1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import structmat as sm

SIZES = {
    "cpu": [(2048, 2048, 64), (4096, 4096, 128), (50_000, 1_000, 50)],
    "cuda": [(4096, 4096, 128), (16_384, 4_096, 128), (50_000, 1_000, 50)],
    "tiny": [(120, 90, 5)],
}
Contender = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def matrix(m: int, n: int, device: str) -> torch.Tensor:
    torch.manual_seed(0)
    r = min(m, n)
    sigma = torch.arange(1, r + 1, device=device) ** -0.5
    left, right = (torch.linalg.qr(torch.randn(s, r, device=device)).Q for s in (m, n))
    return (left * sigma) @ right.T


def contenders(A: torch.Tensor, k: int) -> dict[str, Contender]:
    def svd_lowrank() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U, S, V = torch.svd_lowrank(A, q=k + 10, niter=2)
        return U[:, :k], S[:k], V[:, :k].T

    found: dict[str, Contender] = {
        "structmat": lambda: tuple(sm.linalg.randomized_svd(A, k)),
        "torch.svd_lowrank": svd_lowrank,
    }
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError:
        return found
    if A.device.type == "cpu":
        found["scikit-learn"] = lambda: tuple(
            torch.from_numpy(f) for f in randomized_svd(A.numpy(), k, random_state=0)
        )
    return found


def seconds(contender: Contender, device: str) -> float:
    start = time.perf_counter()
    contender()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(m: int, n: int, k: int, device: str, rounds: int) -> list[dict[str, object]]:
    A = matrix(m, n, device)
    functions = contenders(A, k)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):  # alternating; the first is a warm-up
        for name, function in functions.items():
            spent = seconds(function, device)
            if turn > 0:
                times[name].append(spent)
    best = float(torch.arange(k + 1, min(m, n) + 1, dtype=torch.float64).reciprocal().sum() ** 0.5)
    rows = []
    for name, function in functions.items():
        U, S, Vh = function()
        error = float(torch.linalg.norm((A - (U * S) @ Vh).double()))
        spent = statistics.median(times[name])
        rows.append(
            {
                "size": f"{m} x {n}, k = {k}",
                "contender": name,
                "ms": round(spent * 1e3, 2),
                "speed of structmat": round(spent / statistics.median(times["structmat"]), 2),
                "excess": float(f"{error / best - 1:.2e}"),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    rows = []
    for size in SIZES["tiny" if args.tiny else args.device]:
        for row in measure(*size, args.device, 1 if args.tiny else 7):
            rows.append(row)
            print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
