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


OPERATIONS = [
    low_rank("low_rank_linear", 67, 96, 80, 24),
    low_rank("low_rank_linear, odd sizes", 33, 41, 57, 13),
    low_rank("low_rank_linear, one token", 1, 96, 80, 24),
    Operation("randomized_svd", ((67, 45),), svd, False),
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
