# SPDX-License-Identifier: Apache-2.0
"""How every bench measures: contenders in one process, one run each in turn, medians of many.

A contender is a function without arguments. Before it is timed its answer is compared with the
reference's. The roofline is measured in the same run: the rate of a large product and the bandwidth
of a sum over memory that no cache holds; `floor` is the time they allow at best.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import structmat as sm

Contender = Callable[[], Any]
OUT = Path(__file__).parent / "out"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options all benches share."""
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--tiny", action="store_true", help="small sizes: does it run at all")
    options.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options.add_argument("--json", type=Path, help="where the rows go (default: bench/out)")
    return options


def start(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)


def keep_freed_memory() -> None:
    """Has malloc keep what is freed, instead of giving it back to the system.

    Else a call pays for new pages, 0.3 us a KB, or does not, as the heap happens to lie: the same
    gradients of 16 tokens take 270 us in one process and 820 in another.
    """
    trim_threshold, mmap_max = -1, -4  # of glibc's malloc.h; others have no mallopt
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def check(contenders: dict[str, Contender], reference: Any, tolerance: float) -> dict[str, float]:
    """Raises unless every answer is within `tolerance` (relative, Frobenius) of the reference.

    Returns the seconds of these first calls, cold ones.
    """
    wanted = reference if isinstance(reference, Sequence) else [reference]
    seconds = {}
    for name, contender in contenders.items():
        begin = time.perf_counter()
        answer = contender()
        seconds[name] = time.perf_counter() - begin
        answers = answer if isinstance(answer, Sequence) else [answer]
        for got, want in zip(answers, wanted, strict=True):
            want = want.double().to(got.device)
            error = (got.detach().double() - want).norm() / want.norm().clamp_min(1e-300)
            if not error <= tolerance:
                raise AssertionError(f"{name} is off by {error:.2g}, allowed {tolerance:.2g}")
    return seconds


def _captured(contender: Contender) -> Contender:
    """The contender as a CUDA graph: what the GPU does, without what it costs to ask for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            contender()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contender()
    return graph.replay


def _seconds_cuda(contender: Contender, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        contender()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / repeats / 1e3


def seconds_cpu(contender: Contender, repeats: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        contender()
    return (time.perf_counter() - begin) / repeats


def measure(
    contenders: dict[str, Contender],
    device: str,
    budget: float = 0.6,
    tiny: bool = False,
    settle: float = 0.0,
    least: int = 5,
) -> dict[str, float]:
    """Median seconds of each contender, their runs alternating, for `budget` seconds in all and at
    least `least` times.

    A run is as many calls as take 2 ms, up to 50. On a CPU a call that is not timed comes before
    each run of one: it meets the caches and the memory as the contender before has left them.

    settle: seconds to wait before each run, where contenders bring threads of their own: those of
    the one before spin for some 50 ms, which made the next up to 3 times as slow.
    """
    if device == "cuda":
        contenders = {name: _captured(c) for name, c in contenders.items()}
    seconds = _seconds_cuda if device == "cuda" else seconds_cpu
    once = max(seconds(c, 2) for c in contenders.values())
    repeats = max(1, min(50, int(2e-3 / max(once, 1e-7))))
    again = device == "cpu" and repeats == 1 and not tiny

    def run(contender: Contender) -> float:
        if again:
            contender()
        return seconds(contender, repeats)

    for contender in contenders.values():
        run(contender)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    rounds = (2, 2) if tiny else (least, 2000)
    end = time.perf_counter() + budget
    while len(times[next(iter(times))]) < rounds[0] or (
        time.perf_counter() < end and len(times[next(iter(times))]) < rounds[1]
    ):
        for name, contender in contenders.items():
            time.sleep(settle)
            times[name].append(run(contender))
    return {name: statistics.median(t) for name, t in times.items()}


class Roofline:
    """FLOPs and bytes a second of this machine, measured when first asked for."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self._flops: dict[torch.dtype, float] = {}
        self._bandwidth = 0.0

    def _best(self, contender: Contender) -> float:
        timer = (lambda: _seconds_cuda(contender, 5)) if self.device == "cuda" else (
            lambda: seconds_cpu(contender)
        )  # fmt: skip
        return min(timer() for _ in range(2 if self.tiny else 10))

    def flops(self, dtype: torch.dtype) -> float:
        if dtype not in self._flops:
            n = 64 if self.tiny else 8192 if self.device == "cuda" else 2048
            a = torch.randn(n, n, device=self.device).to(dtype)
            self._flops[dtype] = 2 * n**3 / self._best(lambda: a @ a)
        return self._flops[dtype]

    def bandwidth(self) -> float:
        if not self._bandwidth:
            n = 1 << (12 if self.tiny else 28 if self.device == "cuda" else 26)
            a = torch.zeros(n, device=self.device)
            self._bandwidth = 4 * n / self._best(lambda: a.sum())
        return self._bandwidth

    def floor(self, flops: float, bytes_: float, dtype: torch.dtype) -> float:
        return max(flops / self.flops(dtype), bytes_ / self.bandwidth())


def machine(device: str) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "structmat": sm.__version__,
        "python": platform.python_version(),
    }


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def summarize_ratios(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    ratios = [row["ratio"] for row in rows]
    return {"geometric_mean": geometric_mean(ratios), "least": min(ratios, default=0)}


def picture(args: argparse.Namespace, name: str) -> Path:
    """Where a picture goes: --out, else docs, of tiny sizes bench/out."""
    OUT.mkdir(exist_ok=True)
    return args.out or (OUT if args.tiny else Path("docs")) / name


def write(args: argparse.Namespace, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    path = args.json or OUT / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"bench": name, "machine": machine(args.device), **more, "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
