# SPDX-License-Identifier: Apache-2.0
"""What a model costs to run: time, alternating between models, and memory."""

import os
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHAPES = ((1, 16), (1, 128), (32, 128))  # (sentences, tokens)


def shape_name(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def use_available_cpus() -> int:
    """Lets torch use no more threads than this process may run on; returns how many it uses.

    In a container torch counts the machine's cores; more threads than cores slow every model down,
    and not all by the same factor.
    """
    threads = min(torch.get_num_threads(), len(os.sched_getaffinity(0)))
    torch.set_num_threads(threads)
    return threads


@torch.inference_mode()
def latencies(
    models: Mapping[str, nn.Module],
    shape: tuple[int, int],
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of one forward pass per model and round, on the same tokens.

    Every round visits every model, in an order that rotates from round to round, so that a slow
    second of the machine hits them alike. A visit to a small shape warms the caches first, as
    serving one model does, and counts as the median of five passes.

    Returns:
        For each model, ``rounds`` numbers; ratios are to be taken round by round.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20_000, shape, generator=generator)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    small = shape[0] * shape[1] <= 256
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        models[name](**batch)
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            if small:
                models[name](**batch)
            passes = [_seconds(models[name], batch) for _ in range(5 if small else 1)]
            times[name].append(statistics.median(passes))
        on_round()
    return times


def _seconds(model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    model(**batch)
    return time.perf_counter() - started


def speedup(original: Sequence[float], other: Sequence[float]) -> float:
    """Median over rounds of the original's time by the other's time in the same round.

    >>> speedup([2.0, 4.0, 2.0], [1.0, 2.0, 2.0])
    2.0
    """
    return statistics.median(a / b for a, b in zip(original, other, strict=True))


@torch.inference_mode()
def peak_bytes(model: nn.Module, shape: tuple[int, int] = SHAPES[-1]) -> int:
    """Bytes of the weights plus the most that is alive at once during one forward pass.

    Counts the storage of every tensor an operator returns until it is freed. Exact and repeatable,
    unlike the resident memory of a process, which includes what the allocator has not given back.
    """
    batch = {"input_ids": torch.full(shape, 2000), "attention_mask": torch.ones(shape).long()}
    weights = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in [*model.parameters(), *model.buffers()]
    }
    with _LiveBytes(known=set(weights)) as live:
        model(**batch)
    return sum(weights.values()) + live.peak


class _LiveBytes(TorchDispatchMode):
    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self._known = known
        self._bytes = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self._bytes += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._bytes -= nbytes
