# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.StreamingSVD against scikit-learn's IncrementalPCA on the same blocks of rows.

python bench/bench_streaming_svd.py [--device cuda] [--tiny] [--json FILE]
float32 rows about a mean, singular values i^-1/2 in a random basis. seconds: all updates and the
result, one run each, best of the runs made. ratio: their time over ours, both centred. excess: the
relative Frobenius error over that of the best subspace of this rank, minus 1. estimate: reported
error over the true one, minus 1. share: the time of the measured roofline over ours; its FLOPs are
those of the method in float64, its bytes one reading of the rows.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from harness import Roofline, parser, start, synchronize, write

import structmat as sm

SIZES = {  # rows, columns, rank, rows of a block, runs
    "cpu": [(1_000_000, 256, 32, 4096, 2), (20_000, 4096, 64, 1000, 1)],
    "cuda": [(1_000_000, 256, 32, 4096, 2), (20_000, 4096, 64, 1000, 2)],
    "tiny": [(300, 20, 3, 32, 1), (300, 160, 2, 50, 1)],
}
Contender = Callable[[], tuple[torch.Tensor, float]]  # Vh and the error reported


def stream(m: int, n: int, device: str) -> torch.Tensor:
    """Rows whose right singular values fall like i^-1/2, about a mean of the first one's size."""
    basis = torch.linalg.qr(torch.randn(n, n, device=device)).Q
    mixing = torch.arange(1, n + 1, device=device)[:, None] ** -0.5 * basis
    rows = torch.empty(m, n, device=device)
    for block in rows.split(65_536):
        torch.mm(torch.randn(len(block), n, device=device), mixing, out=block)
        block += basis[0]
    return rows


def contenders(A: torch.Tensor, k: int, block: int) -> dict[str, Contender]:
    def ours(center: bool) -> tuple[torch.Tensor, float]:
        state = sm.linalg.StreamingSVD(A.shape[1], k, center=center, dtype=A.dtype, device=A.device)
        for rows in A.split(block):
            state.update(rows)
        result = state.result()
        synchronize(A.device.type)
        return result.Vh, result.info.error

    found: dict[str, Contender] = {
        "structmat": lambda: ours(True),
        "structmat, uncentred": lambda: ours(False),
    }
    if A.device.type == "cpu":
        try:
            from sklearn.decomposition import IncrementalPCA
        except ImportError:
            return found

        def sklearn() -> tuple[torch.Tensor, float]:
            pca = IncrementalPCA(k)
            for rows in A.split(block):
                if len(rows) >= k:  # it takes no fewer
                    pca.partial_fit(rows.numpy())
            return torch.from_numpy(pca.components_), float("nan")

        found["scikit-learn"] = sklearn
    return found


def moments(A: torch.Tensor, center: bool) -> torch.Tensor:
    n = A.shape[1]
    mean = torch.zeros(n, dtype=torch.float64, device=A.device)
    for rows in A.split(65_536):
        mean += rows.double().sum(0) / len(A)
    total = torch.zeros(n, n, dtype=torch.float64, device=A.device)
    for rows in A.split(65_536):
        wide = rows.double() - mean if center else rows.double()
        total += wide.T @ wide
    return total


def row(m: int, n: int, k: int, block: int, runs: int, args: Any, roofline: Any) -> dict[str, Any]:
    A = stream(m, n, args.device)
    functions = contenders(A, k, block)
    seconds = dict.fromkeys(functions, float("inf"))
    found = {}
    for _ in range(runs):
        for name, function in functions.items():
            time.sleep(0.1)  # threads of the one before spin
            begin = time.perf_counter()
            found[name] = function()
            seconds[name] = min(seconds[name], time.perf_counter() - begin)
    excess, estimate = {}, {}
    for center in (True, False):
        energy = moments(A, center)
        values = torch.linalg.eigvalsh(energy)
        for name, (Vh, reported) in found.items():
            if ("uncentred" in name) is not center:
                V = Vh.to(energy)
                error = (energy.trace() - ((V @ energy) * V).sum()) / values.sum()
                best = values[:-k].sum() / values.sum()
                excess[name] = float((error / best).sqrt()) - 1
                estimate[name] = reported / float(error.sqrt()) - 1
    keep, _ = torch.ops.structmat.streaming_svd_shape(n, k)
    flops = m * n * (n if keep == n else 8 * keep)
    floor = roofline.floor(flops, 4 * m * n, torch.float64)
    ours = seconds["structmat"]
    if "scikit-learn" in excess and not args.tiny:
        assert excess["structmat"] <= excess["scikit-learn"] + 1e-7, excess
    return {
        "rows": m,
        "n": n,
        "rank": k,
        "block": block,
        "flops": flops,
        "bytes": 4 * m * n,
        "seconds": seconds,
        "ratio": {name: s / ours for name, s in seconds.items() if name != "structmat"},
        "excess": excess,
        "estimate": estimate,
        "floor": floor,
        "share": floor / ours,
    }


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    roofline = Roofline(args.device, args.tiny)
    rows = []
    for size in SIZES["tiny" if args.tiny else args.device]:
        found = row(*size, args, roofline)
        rows.append(found)
        print(
            f"{found['rows']} x {found['n']}, rank {found['rank']}, blocks of {found['block']}: "
            f"{found['flops'] / 1e9:.1f} GFLOP, {found['bytes'] / 1e9:.2f} GB, "
            f"floor {found['floor']:.3f} s, {100 * found['share']:.0f} % of the roofline"
        )
        for name, spent in found["seconds"].items():
            print(
                f"  {name:21} {spent:8.3f} s  ratio {found['ratio'].get(name, 1.0):6.2f}  "
                f"excess {found['excess'][name]:.2e}  estimate {found['estimate'][name]:+.1e}"
            )
    write(args, "streaming_svd", rows)


if __name__ == "__main__":
    main()
