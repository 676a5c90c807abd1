# SPDX-License-Identifier: Apache-2.0
"""One small call of every operator, its gradients included: what stream tests, CUDA graphs and
compute-sanitizer run. `python tests/operations.py [cuda | cpu]` runs them all once."""

import functools
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


WIDE = (torch.float32, torch.float64)


def low_rank(name: str, tokens: int, m: int, n: int, r: int) -> Operation:
    return Operation(name, ((tokens, n), (m, r), (r, n), (m,)), sm.ops.low_rank_linear)


def monarch(name: str, tokens: int, *sizes: int) -> Operation:
    K, J, R, I, L = sizes
    shapes = ((tokens, K * I), (K, J, R, I), (J, L, K, R), (J * L,))
    return Operation(name, shapes, fused_and_not)


def fused_and_not(x: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        fused = sm.ops.monarch_linear(x, *weights, activation="gelu", output="interleaved")
    return sm.ops.monarch_linear(x, *weights), fused


def chain(x: torch.Tensor, bias: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    return sm.ops.kronecker_sparse_linear(x, factors, bias)


def sparse_low_rank(
    name: str, family: str, tokens: int, m: int, n: int, r: int, density: float = 0.2
) -> Operation:
    drawn = sm.SparsePattern.random(m, n, density, family=family)
    drawn.transpose()
    on = functools.cache(drawn.to)  # a pattern is copied to a device once, before any capture

    def function(
        x: torch.Tensor, U: torch.Tensor, V: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        pattern = on(x.device)
        # torch's U @ V depends on the number of threads
        base = (U[:, :1] * V[:1]).detach() if density == 0.2 else None
        y = sm.ops.sparse_low_rank_linear(x, U, V, pattern, values, bias, base=base)
        return y, sm.ops.sampled_matmul(y, x, pattern)

    return Operation(name, ((tokens, n), (m, r), (r, n), (drawn.nnz,), (m,)), function)


def gaussian(like: torch.Tensor) -> torch.Tensor:
    return torch.ops.structmat.gaussian(like, 37, 129, 3, 1)


def svd(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.structmat.randomized_svd(A, 5, 3, None, 1, False)


def centred_svd(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.structmat.randomized_svd(A, 3, 3, None, 1, True)


def gram_moments(A: torch.Tensor, X: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return sm.linalg.gram_matmul(A, X, return_moments=True)


def orthonormalize(Y: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.structmat.orthonormalize(torch.cat([Y, Y], dim=1), 1)


def range_step(A: torch.Tensor, Q: torch.Tensor) -> tuple[torch.Tensor, ...]:
    wide = torch.promote_types(A.dtype, torch.float32)
    P, after, B, finite = torch.ops.structmat.range_step(
        [A, A.T], [Q.to(wide), A.to(wide)[:, :4]], 1
    )
    return (*P, *after, *B, finite)


def block_svd(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.ops.structmat.block_svd(A.unflatten(1, (5, 9)).transpose(0, 1), 3)


def svd_list(*A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    U, S, Vh, facts = torch.ops.structmat.randomized_svd_list(list(A), [2, 3], None, None, 1, False)
    return (*U, *S, *Vh, facts)


def streaming(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Updates, folds, a merge and the result of second moments."""
    ops, n, rank = torch.ops.structmat, A.shape[1], 2
    keep, chunk = ops.streaming_svd_shape(n, rank)
    first, second = (streaming_state(A, keep, chunk) for _ in range(2))
    ops.streaming_svd_update(*first, rank, 0.99, True, 0, 0, A)
    ops.streaming_svd_fold(*first, rank, 0.99, True, len(A), len(A) - chunk)
    ops.streaming_svd_update(*second, rank, 0.99, True, 0, 0, A[:5])
    ops.streaming_svd_fold(*second, rank, 0.99, True, 5, 5)
    ops.streaming_svd_merge(*first, rank, 0.99, True, len(A), 0, *second, 5, 0)
    found = ops.streaming_svd_result(*first, rank, 0.99, True, len(A) + 5, 0)
    return (*found, *first[1:], ops.streaming_svd_check(A))


def streaming_wide(A: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One chunk of wide rows and the result. The rows span little: the emulator is slow."""
    ops, n, rank = torch.ops.structmat, A.shape[1], 2
    keep, chunk = ops.streaming_svd_shape(n, rank)
    assert keep < n
    state = streaming_state(A, keep, chunk)
    rows = A[torch.arange(chunk, device=A.device) % len(A)]
    ops.streaming_svd_update(*state, rank, 1.0, False, 0, 0, rows)
    return (*ops.streaming_svd_result(*state, rank, 1.0, False, chunk, 0), *state[1:])


def streaming_state(A: torch.Tensor, keep: int, chunk: int) -> list[torch.Tensor]:
    n = A.shape[1]
    wide = [A.new_zeros(size, dtype=torch.float64) for size in ((keep, n), (n,), (2,))]
    return [A.new_zeros(chunk, n), *wide]


OPERATIONS = [
    low_rank("low_rank_linear", 67, 96, 80, 24),
    low_rank("low_rank_linear, odd sizes", 33, 41, 57, 13),
    low_rank("low_rank_linear, one token", 1, 96, 80, 24),
    monarch("monarch_linear", 33, 2, 3, 8, 32, 16),
    monarch("monarch_linear, odd sizes", 37, 3, 2, 5, 7, 9),
    monarch("monarch_linear, one token", 1, 3, 2, 8, 16, 24),
    Operation("block_svd", ((13, 45),), block_svd, False),
    Operation("block_diagonal_linear", ((37, 33), (3, 7, 11)), sm.ops.block_diagonal_linear),
    Operation(
        "kronecker_sparse_linear",
        ((37, 20), (12,), (4, 6, 5, 1), (1, 2, 3, 8), (2, 3, 4, 2)),
        chain,
    ),
    Operation("gram_matmul", ((67, 45), (45, 5)), sm.linalg.gram_matmul),
    Operation("gram_matmul_moments", ((67, 45), (45, 5)), gram_moments),
    Operation("orthonormalize", ((41, 7),), orthonormalize, False, WIDE),
    Operation("range_step", ((41, 23), (23, 5)), range_step, False),
    Operation("randomized_svd", ((67, 45),), svd, False),
    Operation("randomized_svd, centred", ((41, 23),), centred_svd, False),
    Operation("randomized_svd_list", ((13, 9), (5, 11)), svd_list, False, (torch.float32,)),
    sparse_low_rank("sparse_low_rank_linear", "uniform", 35, 41, 37, 5),
    sparse_low_rank("sparse_low_rank_linear, columns", "columns", 35, 32, 48, 8),
    sparse_low_rank("sparse_low_rank_linear, vectors", "vector16", 2, 41, 48, 5),
    sparse_low_rank("sparse_low_rank_linear, blocks", "block16", 35, 32, 48, 8),
    sparse_low_rank("sparse_low_rank_linear, strips", "block16", 35, 48, 176, 8, 0.09),
    sparse_low_rank("sparse_low_rank_linear, spread", "vector16", 1025, 36, 48, 20, 0.05),
    Operation("streaming_svd", ((133, 9),), streaming, False),
    Operation("streaming_svd, wide rows", ((3, 131),), streaming_wide, False, (torch.float32,)),
    Operation("gaussian", ((0,),), gaussian, False, WIDE),
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
