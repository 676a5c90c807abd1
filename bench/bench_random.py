# SPDX-License-Identifier: Apache-2.0
"""sm.linalg.gaussian, the same numbers everywhere, against torch.randn.

python bench/bench_random.py [--device cuda] [--tiny] [--json FILE]
ratio: torch's time over ours.
"""

import torch
from harness import measure, parser, start, write

import structmat as sm

SIZES = [(4096, 144), (50_000, 64), (16_384, 4_096)]


def main() -> None:
    args = parser(__doc__).parse_args()
    start(args)
    rows = []
    for m, n in [(64, 33)] if args.tiny else SIZES:
        seconds = measure(
            {
                "structmat": lambda m=m, n=n: sm.linalg.gaussian(m, n, device=args.device),
                "torch": lambda m=m, n=n: torch.randn(m, n, device=args.device),
            },
            args.device,
            tiny=args.tiny,
        )
        ratio = seconds["torch"] / seconds["structmat"]
        gbytes = 4 * m * n / seconds["structmat"] / 1e9
        rows.append({"m": m, "n": n, "seconds": seconds, "ratio": ratio, "gbytes": gbytes})
        ours = 1e3 * seconds["structmat"]
        print(f"{m} x {n}: {ours:.3f} ms, {gbytes:.2f} GB/s, ratio {ratio:.2f}")
    write(args, "random", rows)


if __name__ == "__main__":
    main()
