# SPDX-License-Identifier: Apache-2.0
"""One small call of every operator, its gradients included: what stream tests, CUDA graphs and
compute-sanitizer run. `python tests/operations.py [cuda | cpu]` runs them all once."""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

import structmat as sm


@dataclass(frozen=True)
class Operation:
    name: str
    shapes: tuple[tuple[int, ...], ...]
    function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    differentiable: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

    def make(self, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)  # small numbers: the gradients must fit float16
        return [(torch.randn(shape) / 8).to(dtype).to(device) for shape in self.shapes]

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """The results, and the gradients of the sum of the first one's squares."""
        leaves = [t.detach().requires_grad_(self.differentiable) for t in inputs]
        found = self.function(*leaves)
        results = [found] if isinstance(found, torch.Tensor) else list(found)
        if self.differentiable:
            results += torch.autograd.grad(results[0].square().sum(), leaves)
        return [t.detach() for t in results]


def low_rank(name: str, tokens: int, m: int, n: int, r: int) -> Operation:
    return Operation(name, ((tokens, n), (m, r), (r, n), (m,)), sm.ops.low_rank_linear)


def gaussian(like: torch.Tensor) -> torch.Tensor:
    return torch.ops.structmat.gaussian(like, 37, 129, 3, 1)


def svd(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.structmat.randomized_svd(A, 5, 3, None, 1)


def streaming(rank: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Updates, a fold, a merge and the result of a state."""

    def run(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ops, n = torch.ops.structmat, A.shape[1]
        keep, chunk = ops.streaming_svd_shape(n, rank)
        wide = {"dtype": torch.float64, "device": A.device}
        states, kept = [], min(len(A), chunk + 2)
        for rows in (A[:kept], A[kept:]):
            state = (
                torch.zeros(chunk, n, dtype=A.dtype, device=A.device),
                *(torch.zeros(size, **wide) for size in ((keep, n), (n,), (2,))),
            )
            ops.streaming_svd_update(*state, rank, 0.99, True, 0, 0, rows)
            states.append((*state, len(rows), len(rows) % chunk))
        first, second = states
        ops.streaming_svd_fold(*first[:4], rank, 0.99, True, *first[4:])
        ops.streaming_svd_fold(*second[:4], rank, 0.99, True, *second[4:])
        ops.streaming_svd_merge(
            *first[:4], rank, 0.99, True, kept, 0, *second[:4], len(A) - kept, 0
        )
        found = ops.streaming_svd_result(*first[:4], rank, 0.99, True, len(A), 0)
        return (*found, ops.streaming_svd_check(A))

    return run


OPERATIONS = [
    low_rank("low_rank_linear", 67, 96, 80, 24),
    low_rank("low_rank_linear, odd sizes", 33, 41, 57, 13),
    low_rank("low_rank_linear, one token", 1, 96, 80, 24),
    Operation("randomized_svd", ((67, 45),), svd, False),
    Operation("streaming_svd", ((150, 12),), streaming(3), False),
    Operation("streaming_svd, wide rows", ((70, 131),), streaming(2), False),
    Operation("gaussian", ((0,),), gaussian, False, (torch.float32, torch.float64)),
]


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    for operation in OPERATIONS:
        for dtype in operation.dtypes:
            for result in operation.run(operation.make(dtype, device)):
                assert result.isfinite().all(), (operation.name, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{len(OPERATIONS)} operations ran on {device}")


if __name__ == "__main__":
    main()
