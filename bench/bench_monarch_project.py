# SPDX-License-Identifier: Apache-2.0
"""sm.monarch.project against the published algorithm: full SVDs of all blocks by torch, whose first
triplets are kept.

python bench/bench_monarch_project.py [--device cuda] [--tiny] [--json FILE]
ratio: torch's time over ours; error: of the projection, the same for both.
"""

import torch
from harness import check, geometric_mean, machine, measure, parser, start, write

import structmat as sm

# (n, blocks, rank): square matrices. The published layer has n = blocks^2 rank.
SIZES = [
    (1024, 16, 4),
    (1024, 32, 1),
    (2048, 16, 8),
    (4096, 64, 1),
    (4096, 64, 4),
    (4096, 16, 16),
]


def published(W: torch.Tensor, N: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Dao et al.'s projection, for any rank and with blocked outputs."""
    blocks = W.unflatten(1, (N, -1)).unflatten(0, (N, -1)).permute(2, 0, 1, 3)
    U, S, Vh = torch.linalg.svd(blocks, full_matrices=True)
    root = S[..., :R].sqrt()
    W1 = Vh[..., :R, :] * root[..., None]
    return W1, (U[..., :R] * root[..., None, :]).permute(1, 2, 0, 3).contiguous()


def dense(W1: torch.Tensor, W2: torch.Tensor) -> torch.Tensor:
    n = W1.shape[0] * W1.shape[3]
    return torch.einsum("jlkr,kjri->jlki", W2, W1).reshape(-1, n)


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    rows = []
    for n, N, R in [(48, 4, 3)] if args.tiny else SIZES:
        W = torch.randn(n, n, device=args.device)
        ours, theirs = (lambda: sm.monarch.project(W, N, N, R)), (lambda: published(W, N, R))  # noqa: B023
        found = ours()
        check({"structmat": lambda: dense(*ours())}, dense(*theirs()), 1e-4)  # noqa: B023
        # On CUDA both wait for the device, so that neither can be a graph.
        if args.device == "cuda":
            ours, theirs = (lambda f=f: (f(), torch.cuda.synchronize()) for f in (ours, theirs))
        seconds = measure({"structmat": ours, "torch": theirs}, "cpu", tiny=args.tiny, least=3)
        ratio = seconds["torch"] / seconds["structmat"]
        rows.append(
            {"n": n, "blocks": N, "rank": R, "seconds": seconds, "ratio": ratio}
            | {"error": found.error}
        )
        print(
            f"{n} x {n}, {N} x {N} blocks of rank {R}: {1e3 * seconds['structmat']:.1f} ms, torch "
            f"{1e3 * seconds['torch']:.1f} ms, ratio {ratio:.1f}, error {found.error:.3f}"
        )
    mean = geometric_mean(row["ratio"] for row in rows)
    print(f"{machine(args.device)['device']}: ratio {mean:.1f} in the mean")
    write(args, "monarch_project", rows, mean=mean)


if __name__ == "__main__":
    main()
