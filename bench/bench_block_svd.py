# SPDX-License-Identifier: Apache-2.0
"""torch.ops.structmat.block_svd, truncated SVDs of many blocks, against torch.linalg.svd.

python bench/bench_block_svd.py [--device cuda] [--tiny] [--json FILE]
ratio: torch's time, for thin factors of all ranks, over ours. bench_monarch_project.py measures
whole projections.
"""

import torch
from harness import check, geometric_mean, machine, measure, parser, start, write

# (blocks, p, q, rank)
SIZES = [
    (4096, 8, 8, 1),
    (1024, 16, 16, 4),
    (1024, 32, 32, 1),
    (256, 64, 64, 1),
    (256, 64, 64, 16),
    (256, 64, 64, 64),
    (128, 192, 48, 2),
    (32, 128, 128, 8),
    (8, 256, 256, 16),
    (4, 512, 512, 8),
]


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    rows = []
    for dtype in (torch.float32, torch.float64):
        for blocks, p, q, rank in [(3, 9, 7, 2)] if args.tiny else SIZES:
            A = torch.randn(blocks, p, q, device=args.device).to(dtype)

            def ours(A: torch.Tensor = A, rank: int = rank) -> tuple[torch.Tensor, ...]:
                return torch.ops.structmat.block_svd(A, rank)

            def theirs(A: torch.Tensor = A) -> tuple[torch.Tensor, ...]:
                return torch.linalg.svd(A, full_matrices=False)

            check({"structmat": lambda: ours()[1]}, theirs()[1][..., :rank], 1e-5)
            contenders = {"structmat": ours, "torch": theirs}
            if args.device == "cuda":  # torch's waits for the device, so that it can be no graph
                contenders = {
                    name: lambda f=f: (f(), torch.cuda.synchronize())
                    for name, f in contenders.items()
                }
            seconds = measure(contenders, "cpu", tiny=args.tiny, least=3)
            ratio = seconds["torch"] / seconds["structmat"]
            size = {"blocks": blocks, "p": p, "q": q, "rank": rank, "dtype": str(dtype)}
            rows.append({**size, "seconds": seconds, "ratio": ratio})
            print(
                f"{blocks} of {p} x {q}, rank {rank}, {dtype}: "
                f"{1e6 * seconds['structmat'] / blocks:.1f} us a block, ratio {ratio:.1f}"
            )
    mean = geometric_mean(row["ratio"] for row in rows)
    print(f"{machine(args.device)['device']}: ratio {mean:.1f} in the mean")
    write(args, "block_svd", rows, mean=mean)


if __name__ == "__main__":
    main()
