# SPDX-License-Identifier: Apache-2.0
"""Batches and lists of matrices: sm.linalg.randomized_svd of each, bit for bit."""

import pytest
import torch
from reference import make

import structmat as sm

SHAPES = [(1, 1), (40, 30), (30, 40), (97, 5), (5, 61), (57, 59)]


def assert_same(result, wanted):
    assert all(map(torch.equal, result, wanted))
    for fact in ("error", "rank", "sweeps", "converged"):
        assert getattr(result.info, fact) == getattr(wanted.info, fact)


@pytest.mark.parametrize("batch", [(3,), (2, 1, 2), (0,), (0, 2)], ids=str)
@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_batches(batch, layout):
    A = make(*batch, 40, 30, layout=layout).mT
    U, S, Vh = result = sm.linalg.randomized_svd(A, 4, oversample=4)
    assert (U.shape, S.shape, Vh.shape) == ((*batch, 30, 4), (*batch, 4), (*batch, 4, 40))
    info = result.info
    assert info.rank.shape == info.error.shape == info.sweeps.shape == info.converged.shape == batch
    for index in torch.cartesian_prod(*map(torch.arange, batch)).view(-1, len(batch)).tolist():
        one = tuple(index)
        wanted = sm.linalg.randomized_svd(A[one], 4, oversample=4)
        assert all(torch.equal(t[one], w) for t, w in zip(result, wanted, strict=True))
        assert info.error[one] == wanted.info.error
        assert info.rank[one] == wanted.info.rank
        assert info.sweeps[one] == wanted.info.sweeps
        assert info.converged[one]


def test_batches_of_expanded_matrices():
    A = torch.randn(30, 20).expand(3, 30, 20)
    U, _, _ = result = sm.linalg.randomized_svd(A, 2)
    assert torch.equal(U[0], U[2])
    assert repr(result.info) == "SVDInfo of a batch of shape (3,)"


def test_every_back_end(backend):
    """A list and a batch; emulated calls are slow."""
    A = [make(*shape, device=backend.device) for shape in ((9, 7), (6, 8))]
    wanted = [sm.linalg.randomized_svd(a, 2, seed=1) for a in A]
    several = sm.linalg.randomized_svd(A * 3, 2, seed=1)  # more than a GPU takes side by side
    for result, one in zip(several, wanted * 3, strict=True):
        assert_same(result, one)
    batch = sm.linalg.randomized_svd(torch.stack([A[1], torch.ones_like(A[1])]), 2, seed=1)
    assert all(torch.equal(t[0], w) for t, w in zip(batch, wanted[1], strict=True))
    assert batch.info.rank.tolist() == [2, 1]
    A[1][3, 4] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match=r"A\[1\] contains NaN or Inf"):
        sm.linalg.randomized_svd(A, 2)


def test_lists():
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    A = [make(*shape, dtype=dtypes[i % 4]) for i, shape in enumerate(SHAPES)]
    ranks = [min(1 + 2 * i, *shape) for i, shape in enumerate(SHAPES)]
    results = sm.linalg.randomized_svd(A, ranks, oversample=4, seed=3)
    assert len(results) == len(A)
    for a, rank, result in zip(A, ranks, results, strict=True):
        assert_same(result, sm.linalg.randomized_svd(a, rank, oversample=4, seed=3))
    for a, result in zip(A[1:3], sm.linalg.randomized_svd(tuple(A[1:3]), 2), strict=True):
        assert_same(result, sm.linalg.randomized_svd(a, 2))


def test_same_bits_for_any_thread_count(threads):
    """With few threads matrices run side by side, with many the large ones have all of them."""
    A = [torch.randn(*shape) for shape in [(900, 300), *[(60, 50)] * 5, (50, 700)]]
    wanted = [sm.linalg.randomized_svd(a, 9) for a in A]
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        for result, one in zip(sm.linalg.randomized_svd(A, 9), wanted, strict=True):
            assert_same(result, one)


def test_empty_list():
    assert sm.linalg.randomized_svd([], 3) == []
    assert sm.linalg.randomized_svd([], []) == []


def test_non_finite():
    A = [make(10, 15) for _ in range(4)]
    A[2][3, 4] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError, match=r"A\[2\] contains NaN or Inf"):
        sm.linalg.randomized_svd(A, 3)
    with pytest.raises(torch.linalg.LinAlgError, match=r"A\[1, 0\] contains NaN or Inf"):
        sm.linalg.randomized_svd(torch.stack(A).unflatten(0, (2, 2)), 3)
    A[2] = torch.full((10, 15), 1e38)
    with pytest.raises(torch.linalg.LinAlgError, match=r"exceeds the range .* of A\[2\]"):
        sm.linalg.randomized_svd(A, 3)
    # the others have their results
    U, S, Vh, facts = torch.ops.structmat.randomized_svd_list(A, [3] * 4, None, None, 0, False)
    assert facts[:, 4].tolist() == [1, 1, 0, 1]
    assert all(t.isnan().all() for t in (U[2], S[2], Vh[2]))
    assert torch.equal(S[3], sm.linalg.randomized_svd(A[3], 3).S)


ONE = torch.ones(4, 3)
BAD = [
    (TypeError, r"A is a float without .* \(A\[1\] of the list\)", ([ONE, 1.0], 2)),
    (TypeError, r"A\[0\] is torch.int64", ([ONE.long()], 2)),
    (TypeError, r"A has layout .* \(A\[1\] of the list\)", ([ONE, ONE.to_sparse()], 2)),
    (ValueError, r"A\[1\] must have 2 dimensions in a list, got 3", ([ONE, ONE[None]], 2)),
    (ValueError, r"A\[1\] must have at least 2 dimensions, got 1", ([ONE, ONE[0]], 2)),
    (ValueError, r"A\[1\] is empty, shape \(0, 3\)", ([ONE, ONE[:0]], 2)),
    (ValueError, r"A\[1\] is on meta", ([ONE, ONE.to("meta")], 2)),
    (ValueError, r"rank\[1\] is 4, wanted 1 to 3 for A\[1\]", ([ONE, ONE], [3, 4])),
    (ValueError, r"rank is 3, wanted 1 to 2 for A\[1\]", ([ONE, ONE[:2]], 3)),
    (TypeError, r"rank\[0\] must be an integer, got float", ([ONE], [2.0])),
    (TypeError, "rank must be an integer, got Tensor", ([ONE], torch.tensor([2]))),
    (TypeError, "rank must be an integer, got list", (ONE, [2])),
    (ValueError, "1 ranks for a list of 2 matrices", ([ONE, ONE], [2])),
    (ValueError, r"A is empty, shape \(2, 0, 3\)", (torch.ones(2, 0, 3), 1)),
    (ValueError, "rank is 4, wanted 1 to 3", (torch.ones(2, 4, 3), 4)),
]


@pytest.mark.parametrize(("error", "message", "arguments"), BAD, ids=[b[1][:40] for b in BAD])
def test_bad_input(error, message, arguments):
    with pytest.raises(error, match=message):
        sm.linalg.randomized_svd(*arguments)


def test_operator_checks_too():
    operator = torch.ops.structmat.randomized_svd_list
    for message, arguments in (
        ("1 matrices and 2 ranks", ([ONE], [1, 2])),
        ("A\\[0\\] must have 2 dimensions, got 3", ([ONE[None]], [1])),
        ("rank is 4, wanted 1 to 3", ([ONE], [4])),
        ("rank is 1000000000000, wanted 1 to 3", ([ONE], [10**12])),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments, None, None, 0, False)


def test_gradients():
    A = [make(*shape, dtype=torch.float64) for shape in SHAPES[1:4]]
    leaves = [a.clone().requires_grad_(i != 1) for i, a in enumerate(A)]
    results = sm.linalg.randomized_svd(leaves, 2)
    assert [r.S.requires_grad for r in results] == [True, False, True]
    loss = results[0].U.sum() + results[1].S.sum() + results[2].S.sum()
    grads = torch.autograd.grad(loss, [leaves[0], leaves[2]])
    for leaf, name, grad in ((leaves[0], "U", grads[0]), (leaves[2], "S", grads[1])):
        wanted = torch.autograd.grad(getattr(sm.linalg.randomized_svd(leaf, 2), name).sum(), leaf)
        torch.testing.assert_close(grad, wanted[0], rtol=1e-10, atol=1e-10)


def test_compile(backend):
    def loss(A, B):
        first, second = sm.linalg.randomized_svd([A, B], [2, 3])
        return first.S.sum() + second.U[0].sum() + sm.linalg.randomized_svd(A[None], 2).S.sum()

    A = make(8, 9, device=backend.device).requires_grad_()
    B = make(12, 5, device=backend.device).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(f(A, B), (A, B)) for f in (compiled, loss))
    torch.testing.assert_close(found, wanted)


def test_opcheck():
    A = [torch.randn(12, 9), torch.randn(9, 12, dtype=torch.float64).T]
    operators = torch.ops.structmat
    torch.library.opcheck(operators.randomized_svd_list.default, (A, [3, 2], None, None, 0, False))
    torch.library.opcheck(
        operators.randomized_svd.default, (torch.randn(2, 3, 6, 5), 3, None, None, 0, False)
    )
