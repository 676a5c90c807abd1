# SPDX-License-Identifier: Apache-2.0
"""Projections of dense matrices to Monarch matrices, against float64."""

import pytest
import torch
from conftest import Backend
from reference import UNIT, exact, make

import structmat as sm

WIDE = (torch.float32, torch.float64)
# (k, q, p, l, s, r) with k q = l r: ranks alike, ragged, and some of zero.
BUTTERFLIES = [
    (4, 4, 4, 4, 4, 4),
    (4, 6, 5, 8, 3, 3),
    (4, 2, 3, 8, 5, 1),
    (3, 10, 7, 5, 4, 6),
    (7, 9, 9, 7, 9, 9),
]


def dense(W1: torch.Tensor, W2: torch.Tensor) -> torch.Tensor:
    K, J, _R, I = W1.shape
    M = torch.einsum("jlkr,kjri->jlki", exact(W2), exact(W1))
    return M.reshape(J * W2.shape[1], K * I)


def butterfly_dense(w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    (k, _q, p), (l, s, r) = w1.shape, w2.shape
    h = torch.block_diag(*exact(w1)).reshape(r, l, k * p).transpose(0, 1)
    return torch.einsum("lsr,lrn->sln", exact(w2), h).reshape(s * l, k * p)


def relative(W: torch.Tensor, M: torch.Tensor, C: torch.Tensor | None = None) -> float:
    """||W - M|| / ||W||, weighted by the second moments C of the inputs."""
    C = torch.eye(W.shape[1], dtype=torch.float64) if C is None else exact(C)
    W, E = exact(W), exact(W) - exact(M)
    return float((((E @ C) * E).sum().clamp_min(0) / ((W @ C) * W).sum()).sqrt())


def blocks_of(W: torch.Tensor, K: int, J: int) -> torch.Tensor:
    return W.unflatten(1, (K, -1)).unflatten(0, (J, -1)).permute(2, 0, 1, 3)


def moments(n: int, rank: int | None = None) -> torch.Tensor:
    """Of inputs whose entries depend on one another."""
    X = torch.randn(3 * n, rank or n, dtype=torch.float64)
    X = X @ torch.randn(rank or n, n, dtype=torch.float64)
    return X.T @ X


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1, 1), (4, 4, 4, 4, 1), (3, 5, 7, 4, 2), (2, 3, 9, 12, 9)]
)
def test_project_is_optimal(backend: Backend, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Each block is as near as its singular values allow, and the error says how near."""
    K, J, L, I, R = size
    W = make(J * L, K * I, dtype=dtype, device=backend.device)
    found = sm.monarch.project(W, K, J, R)
    assert found.W1.shape == (K, J, R, I)
    assert found.W2.shape == (J, L, K, R)
    assert found.W1.dtype == found.W2.dtype == dtype
    assert found.W1.is_contiguous()
    assert found.W2.is_contiguous()
    values = torch.linalg.svdvals(blocks_of(exact(W), K, J))
    best = float(values[..., R:].norm() / values.norm())
    rounding = 32 * UNIT[dtype]  # of an SVD and two products: 7 to 9 units, by the BLAS in use
    assert abs(found.error - best) < 8 * UNIT[torch.float32]
    assert abs(relative(W, dense(*found)) - best) < rounding
    assert torch.equal(found.ranks.cpu(), torch.full((K, J), R))


@pytest.mark.parametrize("dtype", WIDE)
def test_project_finds_monarch_matrices_again(dtype: torch.dtype) -> None:
    W1, W2 = torch.randn(4, 6, 2, 5).to(dtype), torch.randn(6, 7, 4, 2).to(dtype)
    W = dense(W1, W2).to(dtype)
    found = sm.monarch.project(W, 4, 6, 2)
    assert found.error < 16 * UNIT[dtype]
    assert relative(W, dense(*found)) < 16 * UNIT[dtype]
    exactly = sm.monarch.project(W, 4, 6, 5)  # of a higher rank than W has
    assert relative(W, dense(*exactly)) < 16 * UNIT[dtype]


@pytest.mark.parametrize("shape", BUTTERFLIES)
@pytest.mark.parametrize("dtype", WIDE)
def test_project_blockdiag_butterfly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The published matrices are found again in every shape; any other loses what it must."""
    k, q, p, l, s, r = shape
    W = butterfly_dense(torch.randn(k, q, p).to(dtype), torch.randn(l, s, r).to(dtype)).to(dtype)
    found = sm.monarch.project_blockdiag_butterfly(W, k, q, l)
    w1, w2 = found
    assert w1.shape == (k, q, p)
    assert w2.shape == (l, s, r)
    assert w1.dtype == w2.dtype == dtype
    assert found.error < 16 * UNIT[dtype]
    assert relative(W, butterfly_dense(w1, w2)) < 16 * UNIT[dtype]

    W = torch.randn(l * s, k * p).to(dtype)
    found = sm.monarch.project_blockdiag_butterfly(W, k, q, l)
    lost = 0.0
    for i in range(k):
        for j in range(l):
            rank = sum(h % l == j for h in range(i * q, (i + 1) * q))
            block = exact(W)[j::l, i * p : (i + 1) * p]
            lost += float(torch.linalg.svdvals(block)[rank:].square().sum())
            assert int(found.ranks[i, j]) == min(rank, s, p)
    best = lost**0.5 / float(exact(W).norm())
    assert abs(found.error - best) < 8 * UNIT[dtype]
    assert abs(relative(W, butterfly_dense(*found)) - best) < 8 * UNIT[dtype]


def test_budget_keeps_the_largest_values(backend: Backend) -> None:
    W = make(20, 24, device=backend.device) * torch.logspace(0, 1, 24, device=backend.device)
    found = sm.monarch.project(W, 4, 2, 2, ranks="budget")
    values = torch.linalg.svdvals(blocks_of(exact(W), 4, 2))
    kept = values.flatten().sort().values[-16:]
    best = float((values.square().sum() - kept.square().sum()).sqrt() / values.norm())
    assert int(found.ranks.sum()) == 16
    assert found.W1.shape[2] == int(found.ranks.max()) > 2
    assert torch.equal(found.ranks.cpu(), (values >= kept[0]).sum(-1))
    assert abs(found.error - best) < 1e-6
    assert abs(relative(W, dense(*found)) - best) < 1e-6
    assert found.error < sm.monarch.project(W, 4, 2, 2).error
    beyond = torch.arange(found.W1.shape[2]) >= found.ranks.cpu()[..., None]
    assert not found.W1.cpu()[beyond].any()
    assert not found.W2.cpu().permute(2, 0, 3, 1)[beyond].any()


def test_budget_of_one_rich_block() -> None:
    """All of the budget may go to one block, up to its size."""
    W = 1e-3 * torch.randn(24, 24)
    W[:12, 12:] = torch.eye(12) + torch.randn(12, 12) / 9
    found = sm.monarch.project(W, 2, 2, 3, ranks="budget")
    assert found.ranks.tolist() == [[0, 0], [12, 0]]
    assert torch.allclose(dense(*found)[:12, 12:], W[:12, 12:].double(), atol=1e-5)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("rank", [None, 7])
def test_weights_of_the_inputs(backend: Backend, dtype: torch.dtype, rank: int | None) -> None:
    """The closed form against the truncated SVD of W C^(1/2); C may be singular."""
    K, J, L, I, R = 3, 2, 5, 6, 2
    W = make(J * L, K * I, dtype=dtype, device=backend.device)
    C = torch.stack([moments(I, rank and 4) for _ in range(K)])
    found = sm.monarch.project(W, K, J, R, inputs=C.to(backend.device))
    whole = torch.block_diag(*C)
    values, Q = torch.linalg.eigh(C)
    root = Q * values.clamp_min(0).sqrt()[:, None] @ Q.mT
    spectrum = torch.linalg.svdvals(blocks_of(exact(W), K, J) @ root[:, None])
    best = float(spectrum[..., R:].norm() / spectrum.norm())
    assert abs(found.error - best) < 1e-7
    assert abs(relative(W, dense(*found), whole) - best) < 1e-6
    assert relative(W, dense(*sm.monarch.project(W, K, J, R)), whole) > best
    full = sm.monarch.project(W, K, J, R, inputs=whole.to(backend.device))
    assert abs(full.error - best) < 1e-6  # nothing couples the blocks: nothing is gained


def test_white_inputs_change_nothing() -> None:
    W = torch.randn(12, 20, dtype=torch.float64)
    plain = sm.monarch.project(W, 4, 3, 2)
    for C in (torch.eye(20), torch.eye(5).expand(4, 5, 5)):
        found = sm.monarch.project(W, 4, 3, 2, inputs=C)
        assert torch.allclose(dense(*found), dense(*plain), atol=1e-12)
        assert abs(found.error - plain.error) < 1e-12


@pytest.mark.parametrize("rank", [None, 10])
def test_coupled_inputs(rank: int | None) -> None:
    """Hardly a gradient is left at the end, and no random start of a minimiser gets far lower."""
    W, C = torch.randn(8, 18, dtype=torch.float64), moments(18, rank)
    C /= C.diagonal().mean()
    diagonal = torch.stack([C[i : i + 6, i : i + 6] for i in range(0, 18, 6)])
    first = sm.monarch.project(W, 3, 2, 1, inputs=diagonal)
    found = sm.monarch.project(W, 3, 2, 1, inputs=C)
    assert abs(found.error - relative(W, dense(*found), C)) < 1e-9
    assert found.error <= relative(W, dense(*first), C)

    def minimise(W1: torch.Tensor, W2: torch.Tensor) -> float:
        leaves = [W1.clone().requires_grad_(), W2.clone().requires_grad_()]
        optimizer = torch.optim.LBFGS(leaves, max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            E = W - torch.einsum("jlkr,kjri->jlki", leaves[1], leaves[0]).reshape(8, 18)
            value = ((E @ C) * E).sum() / ((W @ C) * W).sum()
            value.backward()
            return value

        optimizer.step(loss)
        return float(loss().detach()) ** 0.5

    if rank is not None:  # a singular C: the sweeps end where little is gained by each
        return
    assert minimise(*found) > found.error * (1 - 0.02)  # it ended near a stationary point
    starts = [(torch.randn_like(found.W1), torch.randn_like(found.W2)) for _ in range(4)]
    assert found.error < 1.1 * min(minimise(*start) for start in starts)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("full", [False, True])
def test_rank_without_use_for_the_inputs_goes_to_the_weight(dtype: torch.dtype, full: bool) -> None:
    """Three rows see three directions of a block: the error on them is zero already."""
    W, X = torch.randn(20, 24, dtype=torch.float64).to(dtype), torch.randn(3, 24).double()
    C = X.T @ X
    inputs = C if full else torch.stack([C[i : i + 6, i : i + 6] for i in range(0, 24, 6)])
    blocks = blocks_of(exact(W), 4, 4)
    seen, _ = torch.linalg.qr(blocks @ X.T.unflatten(0, (4, 6))[:, None])
    spectrum = torch.linalg.svdvals(blocks - seen @ (seen.mT @ blocks))  # of what no row sees
    for rank in (3, 4, 5):
        found = sm.monarch.project(W, 4, 4, rank, inputs=inputs)
        assert torch.equal(found.ranks, torch.full((4, 4), rank))
        assert relative(W, dense(*found), C) < 64 * UNIT[torch.float32]
        best = float(spectrum[..., rank - 3 :].norm() / exact(W).norm())
        assert abs(relative(W, dense(*found)) - best) < 1e-5
    budget = sm.monarch.project(W, 4, 4, 5, inputs=inputs, ranks="budget")
    assert int(budget.ranks.sum()) == 16 * 5
    assert relative(W, dense(*budget)) < 16 * UNIT[dtype]


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e300])
@pytest.mark.parametrize("full", [False, True])
def test_scales_change_nothing(scale: float, full: bool) -> None:
    W, C = torch.randn(8, 12, dtype=torch.float64), moments(12)
    inputs = C if full else torch.stack([C[:6, :6], C[6:, 6:]])
    wanted = sm.monarch.project(W, 2, 2, 1, inputs=inputs)
    for found in (
        sm.monarch.project(W * scale, 2, 2, 1, inputs=inputs),
        sm.monarch.project(W, 2, 2, 1, inputs=inputs * (scale / 100)),
    ):
        assert found.error == pytest.approx(wanted.error, rel=1e-9)
    found = sm.monarch.project(W * scale, 2, 2, 1, inputs=inputs)
    torch.testing.assert_close(dense(*found) / scale, dense(*wanted), rtol=1e-4, atol=1e-4)


def test_projection_keeps_its_facts() -> None:
    found = sm.monarch.project(torch.randn(8, 12), 2, 2, 1)
    moved = found._replace(W1=found.W1.double())
    assert moved.W1.dtype == torch.float64
    assert moved.W2 is found.W2
    assert (moved.error, moved.ranks) == (found.error, found.ranks)


def test_sweeps_never_raise_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from structmat.monarch import truncate

    monkeypatch.setattr(truncate, "_LEAST_DECREASE", 0)
    W, C = torch.randn(12, 20), moments(20)
    errors = []
    for sweeps in range(8):
        monkeypatch.setattr(truncate, "_SWEEPS", sweeps)
        errors.append(sm.monarch.project(W, 4, 3, 1, inputs=C).error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_project_of_zeros_and_of_layers() -> None:
    found = sm.monarch.project(torch.zeros(6, 4), 2, 3)
    assert found.error == 0
    assert not found.W1.any()
    assert not found.W2.any()
    assert found.W1.shape == (2, 3, 1, 2)
    found = sm.monarch.project(torch.zeros(6, 4), 2, 3, 1, inputs=torch.ones(4, 4))
    assert found.error == 0
    assert not found.W1.any()
    layer = torch.nn.Linear(64, 32)
    assert not sm.monarch.project(layer.weight, 4, 4).W1.requires_grad
    assert sm.monarch.project(layer.weight, 4, 4).W1.shape == (4, 4, 2, 16)


def test_project_refuses() -> None:
    W, project = torch.randn(12, 20), sm.monarch.project
    indefinite = torch.eye(20)
    indefinite[0, 19] = indefinite[19, 0] = 50
    butterfly = sm.monarch.project_blockdiag_butterfly
    C = torch.eye(20)
    for call, error, message in [
        (lambda: project(W, 3, 3, 1), ValueError, "K is 3, wanted a divisor of 20"),
        (lambda: project(W, 4, 5, 1), ValueError, "J is 5, wanted a divisor of 12"),
        (lambda: project(W, 0, 3, 1), ValueError, "K is 0"),
        (lambda: project(W, 4, 3, 0), ValueError, "R is 0, wanted 1 to 4"),
        (lambda: project(W, 4, 3, 5), ValueError, "R is 5, wanted 1 to 4"),
        (lambda: project(W, 4.0, 3, 1), TypeError, "K must be an integer, got float"),
        (lambda: project(W, 4, 3, 1, ranks="all"), ValueError, "ranks is 'all', wanted 'budget'"),
        (lambda: project([1.0], 1, 1), TypeError, "W must be a tensor, got list"),
        (lambda: project(W.int(), 4, 3), TypeError, "W is torch.int32"),
        (lambda: project(W.cfloat(), 4, 3), TypeError, "W is torch.complex64"),
        (lambda: project(W.to_sparse(), 4, 3), TypeError, "must be dense"),
        (lambda: project(W[0], 1, 1), ValueError, r"wanted \(m, n\)"),
        (lambda: project(W[:0], 4, 1), ValueError, r"W has shape \(0, 20\)"),
        (lambda: project(W.to("meta"), 4, 3), ValueError, "meta"),
        (
            lambda: project(W, 4, 3, 1, inputs=C[:5]),
            ValueError,
            r"wanted \(20, 20\), or \(4, 5, 5\)",
        ),
        (lambda: project(W, 4, 3, 1, inputs=C.triu() + C.roll(1)), ValueError, "not symmetric"),
        (lambda: project(W, 4, 3, 1, inputs=-C), ValueError, "negative eigenvalues"),
        (lambda: project(W, 4, 3, 1, inputs=indefinite), ValueError, "negative eigenvalues"),
        (lambda: project(W, 4, 3, 1, inputs="C"), TypeError, "inputs must be a tensor"),
        (lambda: butterfly(W, 4, 5, 3), ValueError, "q is 5, wanted .* divisible by 3"),
        (lambda: butterfly(W, 4, 3, 5), ValueError, "l is 5, wanted a divisor of 12"),
    ]:
        with pytest.raises(error, match=f"monarch.project.*{message}"):
            call()
    W[3, 4] = torch.nan
    for bad in (lambda: project(W, 4, 3, 1), lambda: project(W.clone(), 4, 3, 1, inputs=C)):
        with pytest.raises(torch.linalg.LinAlgError, match="W contains NaN or Inf"):
            bad()
    with pytest.raises(torch.linalg.LinAlgError, match="inputs contains NaN or Inf"):
        project(torch.randn(12, 20), 4, 3, 1, inputs=C * torch.inf)
