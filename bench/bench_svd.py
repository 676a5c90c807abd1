# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.randomized_svd against torch.svd_lowrank(q=rank + 10, niter=2), scikit-learn and, on a
GPU, cuSOLVER's gesvdr with as many columns and steps as torch's (copying A, which it overwrites).

python bench/bench_svd.py [--device cuda] [--tiny] [--accuracy] [--json FILE]
Singular values i^-1/2. ratio: their time over ours. excess: the relative Frobenius error over that
of the best matrix of this rank, minus 1. share: the time of the measured roofline for our products
with A, over ours. --accuracy: the excess by number of sweeps for several spectra instead.
On a GPU also: one power step against the time of reading A and of the arithmetic, and the linear
layers of a model of 7 billion parameters (svd_on_gpu.py).
"""

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from gesvdr import Gesvdr
from harness import Roofline, measure, parser, start, synchronize, write
from svd_on_gpu import block_of, model, step

import structmat as sm

SIZES = {
    "cpu": [(2048, 2048, 64), (4096, 4096, 128), (50_000, 1_000, 50)],
    "cuda": [(4096, 4096, 128), (16_384, 4_096, 128), (50_000, 1_000, 50)],
    "tiny": [(120, 90, 5)],
}
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def matrix(m: int, n: int, device: str) -> torch.Tensor:
    r = min(m, n)
    sigma = torch.arange(1, r + 1, device=device) ** -0.5
    left, right = (torch.linalg.qr(torch.randn(size, r, device=device)).Q for size in (m, n))
    return (left * sigma) @ right.T


@cache
def gesvdr() -> Gesvdr | None:
    """None, and why, where it does not decompose a small matrix."""
    try:
        found = Gesvdr()
        found(torch.randn(100, 50, device="cuda"), 5)
        return found
    except (OSError, RuntimeError) as error:
        print(f"cuSOLVER gesvdr: skipped, {error}", file=sys.stderr)
        return None


def contenders(A: torch.Tensor, k: int) -> dict[str, Callable[[], Factors]]:
    def ours() -> Factors:
        U, S, Vh = sm.linalg.randomized_svd(A, k)
        synchronize(A.device.type)
        return U, S, Vh

    def theirs() -> Factors:
        U, S, V = torch.svd_lowrank(A, q=k + 10, niter=2)
        synchronize(A.device.type)
        return U[:, :k], S[:k], V[:, :k].T

    found = {"structmat": ours, "torch": theirs}
    if A.device.type == "cuda" and (cusolver := gesvdr()) is not None:
        found["gesvdr"] = lambda: cusolver(A, k)
    if A.device.type == "cpu":
        try:
            from sklearn.utils.extmath import randomized_svd
        except ImportError:
            return found

        def sklearn() -> Factors:
            U, S, Vh = (torch.from_numpy(f) for f in randomized_svd(A.numpy(), k, random_state=0))
            return U, S, Vh

        found["scikit-learn"] = sklearn
    return found


def row(m: int, n: int, k: int, args: Any, roofline: Roofline) -> dict[str, Any]:
    A = matrix(m, n, args.device)
    functions = contenders(A, k)
    best = float((1 / torch.arange(k + 1, min(m, n) + 1, dtype=torch.float64)).sum().sqrt())
    excess = {}
    for name, function in functions.items():
        U, S, Vh = function()
        excess[name] = float((A - (U * S) @ Vh).double().norm()) / best - 1
    assert excess["structmat"] <= 1.01 * excess["torch"] + 1e-6, excess
    # As host code on the GPU too: torch's waits for the device, so it cannot be a graph.
    settle, budget = (0.1, 6) if args.device == "cpu" else (0.0, 2)
    seconds = measure(functions, "cpu", budget=budget, tiny=args.tiny, settle=settle)
    sweeps = sm.linalg.randomized_svd(A, k).info.sweeps
    block = block_of(k) if sweeps == 5 else (3 * k + 127) // 128 * 16  # csrc/core/svd/svd_plan.h
    products = sweeps - (args.device == "cpu")  # the first is with a sparse matrix there
    flops = 2 * m * n * block * products
    floor = roofline.floor(flops, 4 * m * n * sweeps, torch.float32)
    ours = seconds["structmat"]
    return {
        "m": m,
        "n": n,
        "rank": k,
        "seconds": seconds,
        "ratio": {name: s / ours for name, s in seconds.items() if name != "structmat"},
        "excess": excess,
        "share": floor / ours,
    }


# The linear layers of a small model, and some of larger ones.
LAYERS = [
    *[(384, 384), (384, 1536), (1536, 384)] * 48,
    *[(1024, 1024)] * 14,
    *[(1024, 4096), (4096, 1024)] * 4,
    *[(2048, 2048)] * 2,
    *[(4096, 4096)] * 2,
]


def layers(args: Any) -> dict[str, Any]:
    """A list of matrices in one call, in one call each, and by torch."""
    shapes, k = ([(40, 30), (20, 60)], 4) if args.tiny else (LAYERS, 64)
    kinds = {shape: matrix(*shape, args.device) for shape in set(shapes)}
    matrices = [kinds[shape].clone() for shape in shapes]

    def ours() -> list[Factors]:
        results = [tuple(result) for result in sm.linalg.randomized_svd(matrices, k)]
        synchronize(args.device)
        return results

    functions = {
        "structmat": ours,
        "structmat, loop": lambda: [contenders(A, k)["structmat"]() for A in matrices],
        "torch, loop": lambda: [contenders(A, k)["torch"]() for A in matrices],
    }
    excess = {}
    for name, function in functions.items():
        found = zip(shapes, matrices, function(), strict=True)
        excess[name] = max(
            float((A - (U * S) @ Vh).double().norm())
            / float((1 / torch.arange(k + 1, min(shape) + 1, dtype=torch.float64)).sum().sqrt())
            - 1
            for shape, A, (U, S, Vh) in found
        )
    settle, budget = (0.1, 6) if args.device == "cpu" else (0.0, 2)
    seconds = measure(functions, "cpu", budget=budget, tiny=args.tiny, settle=settle, least=2)
    ratio = {name: s / seconds["structmat"] for name, s in seconds.items() if name != "structmat"}
    return {
        "matrices": len(shapes),
        "rank": k,
        "seconds": seconds,
        "ratio": ratio,
        "excess": excess,
    }


SWEEPS = (2, 3, 4, 5, 6, 7, None)


def accuracy(m: int, n: int, k: int, device: str) -> list[dict[str, Any]]:
    """The largest excess error of three seeds, in double precision, by spectrum and sweeps."""
    i = torch.arange(1, n + 1, dtype=torch.float64, device=device)
    spectra = {
        "i^-1/2": i**-0.5,
        "1/i": 1 / i,
        "i^-2": i**-2,
        "exp(-i/20)": torch.exp(-i / 20),
        "flat": torch.ones_like(i),
    }
    left, right = (
        torch.linalg.qr(torch.randn(size, n, dtype=torch.float64, device=device)).Q
        for size in (m, n)
    )
    rows = []
    for name, sigma in spectra.items():
        A, best = (left * sigma) @ right.T, float(sigma[k:].norm())

        def excess(factors: Factors, A: torch.Tensor = A, best: float = best) -> float:
            U, S, Vh = factors
            return float((A - (U * S) @ Vh).norm()) / best - 1

        found: dict[str, Any] = {"singular values": name}
        for sweeps in SWEEPS:
            found["default" if sweeps is None else f"{sweeps} sweeps"] = max(
                excess(sm.linalg.randomized_svd(A, k, sweeps=sweeps, seed=seed))
                for seed in range(3)
            )
        found["torch niter=2"] = excess(contenders(A, k)["torch"]())
        rows.append(found)
        print("| " + " | ".join(v if isinstance(v, str) else f"{v:.1e}" for v in found.values()))
    return rows


def on_gpu(args: Any, roofline: Roofline) -> dict[str, Any]:
    steps = []
    for size in SIZES["tiny" if args.tiny else "cuda"][:2]:
        for dtype in (torch.float32, torch.bfloat16):
            A = matrix(*size[:2], args.device).to(dtype)
            steps.append(step(A, size[2], args, roofline))
            found = steps[-1]
            print(
                f"a power step of {size[0]} x {size[1]}, rank {size[2]}, {found['dtype']}: "
                f"{1e3 * found['power step']:.3f} ms, {found['over the larger']:.2f} of its floor"
            )
            del A
    found = model(args)
    print(f"the {found['matrices']} linear layers of a model, rank {found['rank']}")
    for name, spent in found["seconds"].items():
        print(f"  {name:16} {spent:8.3f} s")
    return {"steps": steps, "model": [found]}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--accuracy", action="store_true", help="errors instead of times")
    args = options.parse_args()
    start(args)
    if args.accuracy:
        size = (60, 40, 5) if args.tiny else (2000, 1000, 50)
        return write(args, "svd_accuracy", accuracy(*size, args.device))
    roofline = Roofline(args.device, args.tiny)
    rows = []
    for size in SIZES["tiny" if args.tiny else args.device]:
        rows.append(row(*size, args, roofline))
        found = rows[-1]
        print(
            f"{size[0]} x {size[1]}, rank {size[2]}: {100 * found['share']:.0f} % of the roofline"
        )
        for name, spent in found["seconds"].items():
            ratio = found["ratio"].get(name, 1.0)
            excess = found["excess"][name]
            print(f"  {name:14} {1e3 * spent:9.2f} ms  ratio {ratio:5.2f}  excess {excess:.2e}")
    rows.append(layers(args))
    found = rows[-1]
    print(f"{found['matrices']} matrices in a list, rank {found['rank']}")
    for name, spent in found["seconds"].items():
        ratio, excess = found["ratio"].get(name, 1.0), found["excess"][name]
        print(f"  {name:15} {1e3 * spent:8.1f} ms  ratio {ratio:5.2f}  excess {excess:.2e}")
    write(args, "svd", rows)  # what follows may be cut off
    if args.device == "cuda" or args.tiny:
        write(args, "svd", rows, **on_gpu(args, roofline))


if __name__ == "__main__":
    main()
