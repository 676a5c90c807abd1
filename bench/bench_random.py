# SPDX-License-Identifier: Apache-2.0
"""Normal random matrices: sm.linalg.gaussian against torch.randn.

python bench/bench_random.py [--device cuda] [--tiny] [--json FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import structmat as sm

SIZES = [(4096, 144), (50_000, 64), (16_384, 4_096)]


def measure(rows: int, cols: int, device: str, rounds: int) -> list[dict[str, object]]:
    functions = {
        "structmat": lambda: sm.linalg.gaussian(rows, cols, device=device),
        "torch.randn": lambda: torch.randn(rows, cols, device=device),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):  # alternating; the first is a warm-up
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    ours = statistics.median(times["structmat"])
    return [
        {
            "size": f"{rows} x {cols}",
            "contender": name,
            "ms": round(statistics.median(spent) * 1e3, 3),
            "speed of structmat": round(statistics.median(spent) / ours, 2),
        }
        for name, spent in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tiny", action="store_true", help="one small size, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    rows = []
    for size in [(64, 33)] if args.tiny else SIZES:
        for row in measure(*size, args.device, 1 if args.tiny else 9):
            rows.append(row)
            print("  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
