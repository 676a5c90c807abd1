# SPDX-License-Identifier: Apache-2.0
"""sm.sparse_low_rank.decompose under full second moments against the plain way: float64 throughout,
steps of S halved until the error falls and doubled after each.

python bench/bench_decompose.py [--size M N] [--device cuda] [--tiny] [--json FILE]
Half of the weights are kept, a quarter of them in U and V, as sm.compress does, in 40 iterations.
The inputs are correlated and of different sizes, 1 % of their mean energy is added.
ratio: the plain way's time over ours; error: of the layer's output.
"""

import math
import statistics

import torch
from harness import geometric_mean, machine, parser, seconds_cpu, start, synchronize, write
from torch import Tensor

import structmat as sm
from structmat.compress.plan import damped
from structmat.compress.sparse_low_rank import sparse_low_rank_shape

SIZES = [(768, 768), (3072, 768), (768, 3072)]  # of BERT's layers, out x in
ITERATIONS = 40


def second_moments(n: int, device: str) -> Tensor:
    size = torch.arange(1, n + 1, device=device) ** -0.6
    x = (torch.randn(4 * n, n, device=device) * size) @ torch.randn(n, n, device=device)
    x = (x * torch.randn(n, device=device).exp()).double()
    return damped(x.T @ x)


def plain(W: Tensor, C: Tensor, rank: int, nnz: int) -> float:
    """The error it comes to."""
    W, C = W.double(), C / C.max()
    d, t = C.diagonal(), 1.0
    G = W @ C
    whole = float((W * G).sum())
    P = torch.randn(len(W), rank, dtype=W.dtype, device=W.device)
    for _ in range(6):
        P = torch.linalg.qr(G @ (W.T @ P)).Q
    V, H = P.T @ W, P.T @ G
    S = torch.zeros_like(W)
    E, F = W - P @ V, G - P @ H  # F = E C
    loss = float((E * F).sum())
    for i in range(ITERATIONS):
        if i:
            X, G = W - S, F + P @ (V @ C)
            P = torch.linalg.qr(G @ (X.T @ P)).Q
            V, H = P.T @ X, P.T @ G
            E, F = X - P @ V, G - P @ H
            loss = float((E * F).sum())
        while True:
            Z = S + F / (t * d)
            scores = Z.square() * d
            least = scores.flatten().kthvalue(W.numel() - nnz).values
            S_new = torch.where(scores > least, Z, 0.0)
            E_new = E + S - S_new
            F_new = E_new @ C
            found = float((E_new * F_new).sum())
            if found <= loss or t > len(d):
                S, E, F, loss, t = S_new, E_new, F_new, found, max(1.0, t / 2)
                break
            t *= 2
    return math.sqrt(loss / whole)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--size", type=int, nargs=2, help="out and in (default: those of BERT)")
    args = options.parse_args()
    start(args)
    sizes = [(48, 32)] if args.tiny else [args.size] if args.size else SIZES
    rows = []
    for m, n in sizes:
        W, C = torch.randn(m, n, device=args.device), second_moments(n, args.device)
        rank, nnz = sparse_low_rank_shape(m, n, 0.5)
        errors: dict[str, float] = {}

        def ours() -> None:
            found = sm.sparse_low_rank.decompose(
                W,  # noqa: B023
                rank,  # noqa: B023
                nnz / W.numel(),  # noqa: B023
                inputs=C,  # noqa: B023
                iterations=ITERATIONS,
            )
            errors["structmat"] = found.error  # noqa: B023

        def theirs() -> None:
            errors["plain"] = plain(W, C, rank, nnz)  # noqa: B023
            synchronize(args.device)

        times: dict[str, list[float]] = {"structmat": [], "plain": []}
        for _ in range(max(1, min(5, int(4e9 / (m * n * n))))):
            times["structmat"].append(seconds_cpu(ours))
            times["plain"].append(seconds_cpu(theirs))
        if errors["structmat"] > 1.03 * errors["plain"]:
            raise AssertionError(f"{m} x {n}: errors {errors}, wanted no more than the plain one")
        seconds = {name: statistics.median(t) for name, t in times.items()}
        ratio = seconds["plain"] / seconds["structmat"]
        rows.append({"m": m, "n": n, "rank": rank, "nnz": nnz, "seconds": seconds, "ratio": ratio})
        rows[-1]["errors"] = errors
        print(
            f"{m} x {n}, rank {rank}, {nnz} entries: {seconds['structmat']:.2f} s, plain "
            f"{seconds['plain']:.2f} s, ratio {ratio:.1f}, errors {errors['structmat']:.4f} and "
            f"{errors['plain']:.4f}",
            flush=True,
        )
    mean = geometric_mean(row["ratio"] for row in rows)
    print(f"{machine(args.device)['device']}: ratio {mean:.1f} in the mean")
    write(args, "decompose", rows, mean=mean)


if __name__ == "__main__":
    main()
