# SPDX-License-Identifier: Apache-2.0
"""Conversions of published layouts: each against the definition its authors give, and back."""

import pytest
import reference
import torch

import structmat as sm

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def blockdiag_butterfly(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """The definition of the authors of Monarch: two batched products and two permutations."""
    (k, _, p), (l, s, r), T = w1.shape, w2.shape, len(x)
    h = torch.bmm(x.reshape(T, k, p).transpose(0, 1), w1.transpose(1, 2)).transpose(0, 1)
    h = h.reshape(T, r, l).transpose(1, 2)
    y = torch.bmm(h.transpose(0, 1), w2.transpose(1, 2)).transpose(0, 1)
    return y.transpose(1, 2).reshape(T, s * l)


# (k, q, p), (l, s, r) with k q = l r; in the first three l divides q.
PUBLISHED = [
    ((4, 6, 5), (3, 7, 8)),
    ((4, 4, 4), (4, 4, 4)),
    ((1, 6, 3), (2, 5, 3)),
    ((4, 6, 5), (8, 3, 3)),
    ((4, 2, 3), (8, 5, 1)),
    ((3, 10, 7), (5, 4, 6)),
    ((16, 9, 3), (12, 2, 12)),
]


@pytest.mark.parametrize(("first", "second"), PUBLISHED, ids=str)
def test_blockdiag_butterfly_as_a_chain(first, second) -> None:
    w1, w2 = randn(*first), randn(*second)
    x = randn(9, first[0] * first[2])
    want = blockdiag_butterfly(x, w1, w2)
    chain = sm.kronecker_sparse.from_blockdiag_butterfly(w1, w2)
    assert [f.data_ptr() for f in chain] == [w1.data_ptr(), w2.data_ptr()]
    torch.testing.assert_close(sm.ops.kronecker_sparse_linear(x, chain), want, **EXACT)
    torch.testing.assert_close(x @ sm.kronecker_sparse.to_dense(chain).T, want, **EXACT)


@pytest.mark.parametrize(("first", "second"), PUBLISHED[:3], ids=str)
def test_blockdiag_butterfly_of_equal_ranks(first, second) -> None:
    w1, w2 = randn(*first), randn(*second)
    x = randn(9, first[0] * first[2])
    want = blockdiag_butterfly(x, w1, w2)
    W1, W2 = sm.monarch.from_blockdiag_butterfly(w1, w2)
    assert (W1.data_ptr(), W2.data_ptr()) == (w1.data_ptr(), w2.data_ptr())
    got = sm.ops.monarch_linear(x, W1, W2, output="interleaved")
    torch.testing.assert_close(got, want, **EXACT)
    dense = sm.monarch.to_dense(W1, W2, output="interleaved")
    torch.testing.assert_close(x @ dense.T, want, **EXACT)
    back = sm.monarch.to_blockdiag_butterfly(W1, W2)
    assert torch.equal(back[0], w1)
    assert torch.equal(back[1], w2)


def test_the_gradients_reach_published_weights() -> None:
    w1, w2, x = randn(4, 6, 5).requires_grad_(), randn(3, 7, 8).requires_grad_(), randn(9, 20)
    dy = randn(9, 21)
    want = torch.autograd.grad(blockdiag_butterfly(x, w1, w2), (w1, w2), dy)
    chain = sm.kronecker_sparse.from_blockdiag_butterfly(w1, w2)
    factors = sm.monarch.from_blockdiag_butterfly(w1, w2)
    for y in (
        sm.ops.kronecker_sparse_linear(x, chain),
        sm.ops.monarch_linear(x, *factors, output="interleaved"),
    ):
        for a, b in zip(torch.autograd.grad(y, (w1, w2), dy), want, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_round_trips_from_canonical_factors() -> None:
    W1, W2 = randn(4, 3, 2, 5), randn(3, 7, 4, 2)
    for there, back in (
        (sm.monarch.to_blockdiag_butterfly, sm.monarch.from_blockdiag_butterfly),
        (sm.monarch.to_btt, sm.monarch.from_btt),
    ):
        again = back(*there(W1, W2))
        assert torch.equal(again[0], W1)
        assert torch.equal(again[1], W2)
    x = randn(9, 20)
    want = reference.monarch_linear(x, W1, W2)
    torch.testing.assert_close(x @ sm.monarch.to_dense(W1, W2).T, want, **EXACT)
    published = sm.monarch.to_blockdiag_butterfly(W1, W2)
    interleaved = reference.monarch_linear(x, W1, W2, output="interleaved")
    torch.testing.assert_close(blockdiag_butterfly(x, *published), interleaved, **EXACT)


def test_btt_of_two_cores() -> None:
    """x (m1, m0) is multiplied by each core, the rank lying inside an output's index."""
    m0, m1, n0, n1, r = 5, 4, 3, 7, 2
    first, second = randn(m1, m0, n0 * r), randn(n0, m1 * r, n1)
    x = randn(9, m1 * m0)
    h = torch.bmm(x.reshape(9, m1, m0).transpose(0, 1), first)  # (m1, T, n0 r)
    h = h.reshape(m1, 9, n0, r).permute(2, 1, 0, 3).reshape(n0, 9, m1 * r)
    want = torch.bmm(h, second).transpose(0, 1).reshape(9, n0 * n1)
    W1, W2 = sm.monarch.from_btt(first, second)
    assert (W1.data_ptr(), W2.data_ptr()) == (first.data_ptr(), second.data_ptr())
    torch.testing.assert_close(sm.ops.monarch_linear(x, W1, W2), want, **EXACT)
    back = sm.monarch.to_btt(W1, W2)
    assert torch.equal(back[0], first)
    assert torch.equal(back[1], second)


@pytest.mark.parametrize(
    ("m", "n", "inner"),
    [
        ((3,), (4,), ()),
        ((2, 3), (4, 5), (2,)),
        ((2, 3, 2), (3, 2, 4), (2, 3)),
        ((2, 2, 2, 2), (2, 1, 3, 2), (1, 2, 1)),
    ],
    ids=str,
)
def test_btt_of_any_number_of_cores(m, n, inner) -> None:
    """W[(m_0 ..), (n_0 ..)] is the sum over the ranks of the product of the cores' entries."""
    count, ranks = len(m), (1, *inner, 1)
    cores = [randn(ranks[t + 1], ranks[t], *m[: t + 1], *n[t:]) for t in range(count)]
    outs, ins, between = "abcd"[:count], "efgh"[:count], "uvwxy"[: count + 1]
    terms = [between[t + 1] + between[t] + outs[: t + 1] + ins[t:] for t in range(count)]
    dense = torch.einsum(",".join(terms) + "->" + outs + ins, *cores)
    dense = dense.reshape(torch.Size(m).numel(), torch.Size(n).numel())
    chain = sm.kronecker_sparse.from_btt(cores)
    torch.testing.assert_close(sm.kronecker_sparse.to_dense(chain), dense, **EXACT)
    x = randn(4, dense.shape[1])
    torch.testing.assert_close(sm.ops.kronecker_sparse_linear(x, chain), x @ dense.T, **EXACT)


def test_blast() -> None:
    """Block (i, j) is B_i diag(D_ij) C_j."""
    B, C, D = randn(3, 4, 2), randn(5, 2, 6), randn(3, 5, 2)
    rows = [torch.cat([B[i] @ D[i, j].diag() @ C[j] for j in range(5)], 1) for i in range(3)]
    dense, x = torch.cat(rows), randn(7, 30)
    chain = sm.kronecker_sparse.from_blast(B, C, D)
    assert {f.data_ptr() for f in chain} == {a.data_ptr() for a in (B, C, D)}
    torch.testing.assert_close(sm.kronecker_sparse.to_dense(chain), dense, **EXACT)
    torch.testing.assert_close(sm.ops.kronecker_sparse_linear(x, chain), x @ dense.T, **EXACT)


def test_low_rank_and_block_diagonal() -> None:
    U, V, W, x = randn(6, 2), randn(2, 8), randn(4, 3, 2), randn(5, 8)
    for chain, dense in (
        (sm.kronecker_sparse.from_low_rank(U, V), U @ V),
        (sm.kronecker_sparse.from_block_diagonal(W), torch.block_diag(*W)),
    ):
        torch.testing.assert_close(sm.kronecker_sparse.to_dense(chain), dense, **EXACT)
        torch.testing.assert_close(sm.ops.kronecker_sparse_linear(x, chain), x @ dense.T, **EXACT)


@pytest.mark.parametrize("shapes", [[(3, 4)], [(2, 3), (4, 5)], [(2, 3), (3, 2), (2, 4)]], ids=str)
def test_kronecker(shapes) -> None:
    """Forward and gradients: those of the few numbers that all blocks share."""
    matrices = [randn(*shape).requires_grad_() for shape in shapes]
    dense = matrices[0]
    for A in matrices[1:]:
        dense = torch.kron(dense, A)
    chain = sm.kronecker_sparse.from_kronecker(matrices)
    assert {f.data_ptr() for f in chain} == {A.data_ptr() for A in matrices}
    torch.testing.assert_close(sm.kronecker_sparse.to_dense(chain), dense, **EXACT)
    x = randn(7, dense.shape[1])
    y, want = sm.ops.kronecker_sparse_linear(x, chain), x @ dense.T
    torch.testing.assert_close(y, want, **EXACT)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, matrices, dy), torch.autograd.grad(want, matrices, dy)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
@pytest.mark.parametrize("increasing", [True, False])
def test_butterfly(levels: int, increasing: bool) -> None:
    """Level by level on single pairs of entries."""
    n = 2**levels
    twiddle, x = randn(levels, n // 2, 2, 2), randn(5, n)
    want = x.clone()
    for level in range(levels):
        stride = 2**level if increasing else n // 2 ** (level + 1)
        before = want.clone()
        pairs = [i for i in range(n) if i // stride % 2 == 0]
        for pair, i in enumerate(pairs):
            both = torch.stack([before[:, i], before[:, i + stride]])
            want[:, [i, i + stride]] = (twiddle[level, pair] @ both).T
    chain = sm.kronecker_sparse.from_butterfly(twiddle, increasing_stride=increasing)
    assert all(f.untyped_storage().data_ptr() == twiddle.data_ptr() for f in chain)
    torch.testing.assert_close(sm.ops.kronecker_sparse_linear(x, chain), want, **EXACT)
    torch.testing.assert_close(x @ sm.kronecker_sparse.to_dense(chain).T, want, **EXACT)


def test_dense_matrix_of_a_chain() -> None:
    factors = [randn(2, 3, 4, 2), randn(3, 2, 1, 4), randn(1, 2, 12, 2)]
    want = torch.eye(16, dtype=torch.float64)
    for factor in factors:
        want = reference.kronecker_sparse_matrix(factor) @ want
    torch.testing.assert_close(sm.kronecker_sparse.to_dense(factors), want, **EXACT)


ones = torch.ones
BAD = [
    ("from_blockdiag_butterfly: w1 is .* with k q = l r", sm.monarch.from_blockdiag_butterfly,
     (ones(4, 6, 5), ones(3, 7, 7))),
    ("8 output blocks of w2 .* do not divide the 6 hidden units .*structmat.kronecker_sparse.from",
     sm.monarch.from_blockdiag_butterfly, (ones(4, 6, 5), ones(8, 2, 3))),
    ("w2 must have 3 dimensions, got 2", sm.kronecker_sparse.from_blockdiag_butterfly,
     (ones(4, 6, 5), ones(3, 7))),
    ("from_btt: first is .* wanted .m1, m0, n0 r.", sm.monarch.from_btt,
     (ones(4, 5, 6), ones(3, 7, 7))),
    ("to_btt: W1 is .* wanted .K, J, R, I.", sm.monarch.to_btt,
     (ones(4, 3, 2, 5), ones(3, 7, 4, 1))),
    ("to_dense: W1 must have 4 dimensions, got 3", sm.monarch.to_dense,
     (ones(4, 3, 2), ones(3, 7, 4, 1))),
    (r"from_btt: cores\[1\] is \(1, 3, 3, 6, 5\)|cores\[0\] is .* wanted \(3, 1, 3, 4, 5\)",
     sm.kronecker_sparse.from_btt, ([ones(2, 1, 3, 4, 5), ones(1, 3, 3, 6, 5)],)),
    ("from_low_rank: U .* has rank 2, V .* 3", sm.kronecker_sparse.from_low_rank,
     (ones(4, 2), ones(3, 5))),
    ("from_block_diagonal: W must have 3 dimensions", sm.kronecker_sparse.from_block_diagonal,
     (ones(4, 2),)),
    ("from_kronecker: matrices is empty", sm.kronecker_sparse.from_kronecker, ([],)),
    ("from_butterfly: twiddle is .2, 3, 2, 2.", sm.kronecker_sparse.from_butterfly,
     (ones(2, 3, 2, 2),)),
    ("from_blast: B is .* wanted .b1, p, r., .b2, r, q. and .b1, b2, r.",
     sm.kronecker_sparse.from_blast, (ones(3, 4, 2), ones(5, 2, 6), ones(3, 5, 1))),
    (r"to_dense: factors\[0\] \(2, 3, 4, 1\) gives 6 columns, factors\[1\] .* takes a c d = 4",
     sm.kronecker_sparse.to_dense, ([ones(2, 3, 4, 1), ones(1, 5, 2, 2)],)),
    ("to_dense: factors is empty", sm.kronecker_sparse.to_dense, ([],)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "function", "arguments"), BAD, ids=[b[0] for b in BAD])
def test_bad_arguments(message: str, function, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_bad_types() -> None:
    W1, W2 = ones(4, 3, 2, 5), ones(3, 7, 4, 2)
    chains = sm.kronecker_sparse
    for message, function, *arguments in [
        ("to_dense: W2 must be a tensor, got list", sm.monarch.to_dense, W1, [1.0]),
        ("to_dense: W2 is torch.float64, W1 torch.float32", sm.monarch.to_dense, W1, W2.double()),
        ("to_btt: W1 must be dense", sm.monarch.to_btt, W1.to_sparse(), W2),
        ("from_btt: first must be a tensor, got int", sm.monarch.from_btt, 1, W2),
        ("to_dense: factors must be a list of tensors, got Tensor", chains.to_dense, W1),
        ("to_dense: factors must be a list of tensors, got int", chains.to_dense, 1),
        (r"to_dense: factors\[1\] is torch.float64", chains.to_dense, [W1, W2.double()]),
        ("from_low_rank: V must be a tensor, got str", chains.from_low_rank, ones(2, 2), "V"),
        (r"from_kronecker: matrices\[0\] must be a tensor", chains.from_kronecker, [1.0]),
    ]:
        with pytest.raises(TypeError, match=message):
            function(*arguments)
