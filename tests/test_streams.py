# SPDX-License-Identifier: Apache-2.0
"""Every operator on a side stream, captured in a CUDA graph, and with the same bits each time."""

import pytest
import torch
from conftest import Backend
from operations import OPERATIONS, Operation

every_operation = pytest.mark.parametrize(
    ("operation", "dtype"),
    [(operation, dtype) for operation in OPERATIONS for dtype in operation.dtypes],
    ids=lambda value: value.name if isinstance(value, Operation) else str(value)[6:],
)
on_gpu = pytest.mark.parametrize("backend", ["cuda"], indirect=True)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@every_operation
def test_same_bits_each_time(backend: Backend, operation: Operation, dtype: torch.dtype) -> None:
    inputs = operation.make(dtype, backend.device)
    first = operation.run(inputs)
    for _ in range(2):
        same(operation.run(inputs), first)


@every_operation
@pytest.mark.parametrize("backend", ["cpu", "cuda-emulated"], indirect=True)
def test_same_bits_for_any_number_of_threads(
    backend: Backend, operation: Operation, dtype: torch.dtype, threads: int
) -> None:
    inputs = operation.make(dtype, backend.device)
    torch.set_num_threads(1)
    one = operation.run(inputs)
    for count in (2, 3):
        torch.set_num_threads(count)
        same(operation.run(inputs), one)


@on_gpu
@every_operation
def test_side_stream(backend: Backend, operation: Operation, dtype: torch.dtype) -> None:
    """The side stream alone waits for its inputs: work on any other stream would see zeros."""
    inputs = operation.make(dtype, backend.device)
    want = operation.run(inputs)
    late = [torch.zeros_like(t) for t in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # clock cycles: about 10 ms
        for to, value in zip(late, inputs, strict=True):
            to.copy_(value)
        got = operation.run(late)
    side.synchronize()
    same(got, want)


@on_gpu
@every_operation
def test_graph_capture(backend: Backend, operation: Operation, dtype: torch.dtype) -> None:
    """A replay reads the new inputs: nothing was computed early, and capture allows no waiting."""
    inputs = operation.make(dtype, backend.device)
    want = operation.run(inputs)
    static = [torch.zeros_like(t) for t in inputs]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        operation.run(static)  # first use loads libraries and modules, which a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operation.run(static)
    for to, value in zip(static, inputs, strict=True):
        to.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    same(got, want)
