# SPDX-License-Identifier: Apache-2.0
"""structmat.sparse_low_rank: dense matrices as sparse plus low rank, repair of a weight."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.compress.sparse_low_rank import sparse_low_rank_shape

FAMILIES = ("uniform", "columns", "vector16", "block16")
decompose = sm.sparse_low_rank.decompose


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def second_moments(n: int) -> Tensor:
    """Of correlated inputs whose sizes differ."""
    x = torch.randn(3 * n, n // 4) @ torch.randn(n // 4, n) + 0.3 * torch.randn(3 * n, n)
    x = (x * torch.logspace(-1, 1, n)).double()
    return x.T @ x / len(x)


def error_of(W: Tensor, approximation: Tensor, C: Tensor | None = None) -> float:
    E, W = W.double() - approximation, W.double()
    C = torch.eye(W.shape[1], dtype=torch.float64) if C is None else C
    return float(((E @ C * E).sum() / (W @ C * W).sum()).sqrt())


def dense(found: sm.sparse_low_rank.SparseLowRank) -> Tensor:
    S = found.pattern.scatter(found.values).double()
    return found.U.double() @ found.V.double() + S


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
def test_a_planted_matrix_is_found(family: str, weighting: str) -> None:
    m, n, rank = 96, 80, 3
    planted = sm.SparsePattern.random(m, n, 0.05, family=family, seed=3)
    values = 3 * torch.randn(planted.nnz)
    W = torch.randn(m, rank) @ torch.randn(rank, n) + planted.scatter(values + 5 * values.sign())
    C = torch.cov(torch.randn(n, 4 * n)).double()
    inputs = {"none": None, "diagonal": C.diagonal(), "full": C}[weighting]
    found = decompose(W, rank, 0.05, family=family, inputs=inputs, iterations=80)
    assert found.pattern == planted
    assert found.error < 1e-6
    torch.testing.assert_close(dense(found), W.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
def test_the_error_is_that_of_the_result_and_never_grows(
    dtype: torch.dtype, weighting: str
) -> None:
    m, n = 70, 52
    W = torch.randn(n, m).to(dtype).T
    C = second_moments(n)
    inputs = {"none": None, "diagonal": C.diagonal(), "full": C}[weighting]
    found = decompose(W, 5, 0.2, inputs=inputs)
    norm = {"none": None, "diagonal": C.diagonal().diag(), "full": C}[weighting]
    assert found.error == pytest.approx(error_of(W, dense(found), norm), rel=1e-9)
    assert found.errors == sorted(found.errors, reverse=True)
    assert found.errors[-1] == pytest.approx(found.error, rel=0.02, abs=4 * torch.finfo(dtype).eps)
    assert len(found.errors) > 3
    assert found.errors[-1] < 0.97 * found.errors[0]
    assert {t.dtype for t in (found.U, found.V, found.values)} == {dtype}
    assert found.U.shape == (m, 5)
    assert found.V.shape == (5, n)


@pytest.mark.parametrize("family", FAMILIES)
def test_supports_are_of_the_family(family: str) -> None:
    for m, n in ((70, 52), (48, 64)):
        found = decompose(torch.randn(m, n), 3, 0.3, family=family, iterations=3)
        drawn = sm.SparsePattern.random(m, n, 0.3, family=family)
        assert sm.SparsePattern.from_mask(found.pattern.to_mask(), family=family) == found.pattern
        if family != "block16" or n % 16 == 0:  # else the last block, if chosen, is narrower
            assert found.pattern.nnz == drawn.nnz == found.values.numel()


def test_it_takes_no_notice_of_autocast() -> None:
    W, d = torch.randn(40, 30), torch.rand(30)
    for inputs in (None, d):
        wanted = decompose(W, 3, 0.2, inputs=inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = decompose(W, 3, 0.2, inputs=inputs)
        assert torch.equal(found.U, wanted.U)
        assert found.pattern == wanted.pattern


def test_what_it_minimises_is_what_gets_small() -> None:
    C = second_moments(48)
    W = torch.randn(64, 48)
    plain, diagonal, full = (decompose(W, 6, 0.2, inputs=c) for c in (None, C.diagonal(), C))
    plain_error, diagonal_error, full_error = (
        error_of(W, dense(found), C) for found in (plain, diagonal, full)
    )
    assert full_error < 0.5 * diagonal_error < 0.5 * plain_error
    assert error_of(W, dense(plain)) < 0.9 * error_of(W, dense(diagonal))
    D = C.diagonal().diag()
    assert error_of(W, dense(diagonal), D) < 0.9 * error_of(W, dense(plain), D)


def test_alternating_beats_one_step() -> None:
    W = torch.randn(64, 48).double()
    U, s, Vh = torch.linalg.svd(W)
    rest = W - U[:, :6] @ s[:6].diag() @ Vh[:6]
    kept = sm.SparsePattern.from_scores(rest.square(), 0.2).to_mask()
    one_step = float((rest * ~kept).norm() / W.norm())
    assert decompose(W, 6, 0.2).error < 0.95 * one_step


@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
def test_density_zero_is_the_truncated_svd(weighting: str) -> None:
    n = 40
    Q = torch.linalg.qr(torch.randn(60, n).double()).Q
    W = (Q * 0.8 ** torch.arange(n)) @ torch.linalg.qr(torch.randn(n, n).double()).Q
    C = {"none": torch.eye(n), "diagonal": torch.rand(n).diag(), "full": second_moments(n)}[
        weighting
    ].double()
    values, Z = torch.linalg.eigh(C)
    s = torch.linalg.svdvals(W @ (Z * values.sqrt()))
    best = float((s[7:].square().sum() / s.square().sum()).sqrt())
    inputs = {"none": None, "diagonal": C.diagonal(), "full": C}[weighting]
    assert decompose(W, 7, 0.0, inputs=inputs).error == pytest.approx(best, rel=1e-3)
    assert sm.sparse_low_rank.compensate(W, torch.zeros_like(W), 7, inputs).error == pytest.approx(
        best, rel=1e-9
    )


def test_rank_zero_is_a_threshold_and_density_one_is_all() -> None:
    W = torch.randn(40, 30)
    found = decompose(W, 0, 0.1)
    kept = W.abs() >= W.abs().flatten().topk(120).values[-1]
    assert torch.equal(found.pattern.to_mask(), kept)
    torch.testing.assert_close(found.values, W[kept], rtol=0, atol=0)
    wanted = float((W * ~kept).norm() / W.norm())
    assert found.error == pytest.approx(wanted)
    assert max(found.errors) == min(found.errors)
    assert decompose(W, 2, 1.0).error < 1e-7
    assert decompose(W, 30, 0.0).error < 1e-6


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e300])
def test_sizes_do_not_matter(scale: float) -> None:
    W = torch.randn(24, 20, dtype=torch.float64)
    C = second_moments(20)
    wanted, found = decompose(W, 2, 0.2, inputs=C), decompose(W * scale, 2, 0.2, inputs=C * scale)
    assert found.error == pytest.approx(wanted.error, rel=1e-6)


def test_inputs_that_are_never_seen() -> None:
    W, C = torch.randn(32, 24), second_moments(24)
    C[:, :6] = C[:6] = 0
    for inputs in (C, C.diagonal(), torch.zeros(24)):
        found = decompose(W, 4, 0.2, inputs=inputs)
        assert torch.isfinite(dense(found)).all()
        assert found.error < 0.9
        repaired = sm.sparse_low_rank.compensate(W, W.round(), 4, inputs)
        assert torch.isfinite(repaired.U @ repaired.V).all()
    assert decompose(torch.zeros(8, 8), 2, 0.1).error == 0


def test_compensation_repairs_in_the_norm_of_the_inputs() -> None:
    W, C = torch.randn(40, 32), second_moments(32)
    W_hat = W * (W.abs() > 0.7)
    D = (W - W_hat).double()
    for inputs, norm in ((None, None), (C.diagonal(), C.diagonal().diag()), (C, C)):
        repaired = sm.sparse_low_rank.compensate(W, W_hat, 5, inputs)
        product = repaired.U.double() @ repaired.V.double()
        assert repaired.error == pytest.approx(error_of(W, W_hat + product, norm), rel=1e-9)
        root = torch.linalg.cholesky(torch.eye(32).double() if norm is None else norm)
        s = torch.linalg.svdvals(D @ root)
        best = s[5:].norm() / (W.double() @ root).norm()
        assert repaired.error == pytest.approx(float(best), rel=1e-6)
    assert sm.sparse_low_rank.compensate(W, W, 5).error == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    W, broken = torch.randn(8, 6), torch.randn(8, 6)
    broken[2, 3] = bad
    for call in (
        lambda: decompose(broken, 1, 0.1),
        lambda: sm.sparse_low_rank.compensate(W, broken, 1),
        lambda: decompose(W, 1, 0.1, inputs=torch.full((6,), bad)),
        lambda: decompose(W, 1, 0.1, inputs=torch.full((6, 6), bad)),
    ):
        with pytest.raises(torch.linalg.LinAlgError, match="NaN or Inf"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"W": [[1.0]]}, TypeError, "W must be a tensor"),
        ({"W": torch.ones(3)}, ValueError, "W has shape"),
        ({"W": torch.ones(3, 0)}, ValueError, "W has shape"),
        ({"W": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "W is torch.int64"),
        ({"rank": 7}, ValueError, "rank is 7, wanted 0 to 6"),
        ({"rank": -1}, ValueError, "rank is -1"),
        ({"rank": 1.5}, TypeError, "rank"),
        ({"density": 1.1}, ValueError, "density is 1.1"),
        ({"family": "rows"}, ValueError, "family is 'rows'"),
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"inputs": torch.ones(5)}, ValueError, "inputs has shape"),
        ({"inputs": -torch.ones(6)}, ValueError, "negative"),
        ({"inputs": -torch.eye(6)}, ValueError, "negative eigenvalues"),
        ({"inputs": torch.ones(6, 6).triu()}, ValueError, "not symmetric"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"W": torch.randn(8, 6), "rank": 2, "density": 0.1}
    with pytest.raises(error, match=message):
        decompose(**(good | options))


def test_bad_weights_to_repair() -> None:
    W = torch.randn(8, 6)
    with pytest.raises(ValueError, match="W_hat is"):
        sm.sparse_low_rank.compensate(W, W.T, 2)
    with pytest.raises(ValueError, match="rank is 7"):
        sm.sparse_low_rank.compensate(W, W, 7)


def test_from_linear_weighs_by_the_inputs() -> None:
    linear, C = nn.Linear(48, 64), second_moments(48)
    plain = sm.nn.SparseLowRankLinear.from_linear(linear, 4, 0.2)
    fitted = sm.nn.SparseLowRankLinear.from_linear(linear, 4, 0.2, inputs=C)
    W = linear.weight.detach()
    errors = [
        error_of(W, layer.to_linear().weight.detach().double(), C) for layer in (plain, fitted)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert torch.equal(fitted.bias, linear.bias)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40), nn.Linear(40, 40))


def test_sizes_use_the_budget() -> None:
    for m, n, keep in ((64, 48, 0.5), (4096, 4096, 0.3), (7, 5, 0.2), (1, 1, 0.5)):
        rank, nnz = sparse_low_rank_shape(m, n, keep)
        assert rank * (m + n) + nnz == int(keep * m * n)
        assert rank * (m + n) <= 0.25 * keep * m * n < (rank + 1) * (m + n)


@pytest.mark.parametrize("data", [False, True])
def test_a_model_is_compressed_saved_and_loaded(tmp_path: Path, data: bool) -> None:
    model, original = network(), network()
    batches = [torch.randn(60, 12) @ torch.randn(12, 48) for _ in range(2)] if data else None
    report = sm.compress(model, 0.5, method="sparse_low_rank", calibration=batches)
    assert 0.49 < report.kept <= 0.5
    for i in (0, 2, 3):
        layer, W = model[i], original[i].weight.detach()
        assert isinstance(layer, sm.nn.SparseLowRankLinear)
        assert layer.bias is not None
        entry = next(x for x in report.layers if x.name == str(i))
        assert (entry.kind, entry.rank, entry.nnz) == (
            "sparse_low_rank",
            layer.rank,
            layer.pattern.nnz,
        )
        assert entry.params_after == sum(p.numel() for p in (layer.U, layer.V, layer.values))
        if data:
            assert entry.measured_error == pytest.approx(entry.predicted_error, rel=1e-3)
        else:
            bare = error_of(W, layer.to_linear().weight.detach().double())
            assert entry.predicted_error == pytest.approx(bare, rel=1e-4)
    assert "%" in report.layers[0].size
    sm.save_pretrained(model, tmp_path / "saved")
    again = sm.load_pretrained(tmp_path / "saved", model=network())
    x = torch.randn(5, 48)
    assert torch.equal(again(x), model.eval()(x))
    assert again[0].pattern == model[0].pattern
    with pytest.raises(ValueError, match="no leading part"):
        sm.load_pretrained(tmp_path / "saved", 0.3, model=network())


@pytest.mark.parametrize("weighting", ["none", "diagonal", "full"])
def test_all_places_take_what_is_left(weighting: str) -> None:
    W, C = torch.randn(60, 50), second_moments(50)
    inputs = {"none": None, "diagonal": C.diagonal(), "full": C}[weighting]
    for rank in (0, 4):
        found = decompose(W, rank, 1.0, inputs=inputs)
        assert found.error < 1e-6
        torch.testing.assert_close(dense(found), W.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("least", [1e-60, 1e-76, 1e-78, 1e-82, 1e-90, 1e-95])
def test_weights_of_columns_may_be_far_apart(least: float) -> None:
    W, d = torch.randn(30, 20), torch.ones(20, dtype=torch.float64)
    d[:7] = least
    for rank in (0, 2):
        found = decompose(W, rank, 0.2, inputs=d)
        assert found.error == pytest.approx(error_of(W, dense(found), d.diag()), rel=1e-6)
        assert 0 < found.error < 1


def test_what_overflows_is_no_result() -> None:
    W = 65000 * torch.randn(24, 20).sign()
    C = second_moments(20)
    for inputs in (None, C):
        with pytest.raises(torch.linalg.LinAlgError, match=r"overflows torch\.float16"):
            decompose(W.half(), 2, 0.2, inputs=inputs)
        assert decompose(W, 2, 0.2, inputs=inputs).error < 1


def test_data_makes_the_outputs_better() -> None:
    batches = [torch.randn(60, 12) @ torch.randn(12, 48) for _ in range(2)]
    fitted, plain = network(), network()
    sm.compress(fitted, 0.3, method="sparse_low_rank", calibration=batches)
    sm.compress(plain, 0.3, method="sparse_low_rank")
    x, wanted = batches[0], network()(batches[0])
    assert (fitted(x) - wanted).norm() < 0.5 * (plain(x) - wanted).norm()


def test_tied_layers_stay_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    model[2].weight = model[0].weight
    sm.compress(model, 0.5, method="sparse_low_rank")
    assert model[0].values is model[2].values
    sm.save_pretrained(model, tmp_path / "saved")
    bare = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    again = sm.load_pretrained(tmp_path / "saved", model=bare)
    assert again[0].values is again[2].values
    x = torch.randn(3, 40)
    assert torch.equal(again(x), model.eval()(x))


def test_global_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="'sparse_low_rank' has ranks='uniform' only"):
        sm.compress(
            network(), method="sparse_low_rank", ranks="global", calibration=[torch.ones(2, 48)]
        )


def ill_conditioned(name: str, n: int) -> Tensor:
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    k = torch.arange(n, dtype=torch.float64) / (n - 1)
    values = {
        "1e8": 10 ** (-8 * k),
        "1e16": 10 ** (-16 * k),
        "spike": torch.where(k == 0, 1e8, 10 ** (-4 * k)),
        "rank n/2": torch.where(k < 0.5, 10 ** (-2 * k), 0),
        "rank n/8": (k < 0.125).double(),
    }.get(name, 10 ** (-3 * k))
    root = Q * values.sqrt()
    if name == "columns apart":
        root *= torch.logspace(-4, 0, n).double()[:, None]
    if name == "zero columns":
        root[: n // 4] = 0
    C = root @ root.T
    return (C + C.T) / 2


def plain_descent(W: Tensor, C: Tensor, rank: int, nnz: int, iterations: int) -> float:
    """The error of the same alternation in float64 throughout, with SVDs and the safe step."""
    W, S, D = W.double(), torch.zeros_like(W).double(), C.diagonal().clamp_min(1e-300)
    values, Q = torch.linalg.eigh(C)
    root = Q * values.clamp_min(0).sqrt()
    scaled = C / D.sqrt() / D.sqrt()[:, None]
    t = float(torch.linalg.eigvalsh(scaled)[-1])
    for _ in range(iterations):
        P = torch.linalg.svd((W - S) @ root, full_matrices=False).U[:, :rank]
        E = W - S - P @ (P.T @ (W - S))
        Z = S + E @ C / (t * D)
        least = (Z.square() * D).flatten().kthvalue(Z.numel() - nnz).values
        S = Z * (Z.square() * D > least)
    return error_of(W, P @ (P.T @ (W - S)) + S, C)


@pytest.mark.parametrize(
    "name", ["1e8", "1e16", "spike", "rank n/2", "rank n/8", "zero columns", "columns apart"]
)
def test_float32_is_as_good_as_float64(name: str) -> None:
    m, n, rank = 80, 64, 4
    C = ill_conditioned(name, n)
    W = torch.randn(m, 3) @ torch.randn(3, n) / 2 + torch.randn(m, n)
    found, wide = decompose(W, rank, 0.2, inputs=C), decompose(W.double(), rank, 0.2, inputs=C)
    assert found.error == pytest.approx(error_of(W, dense(found), C), rel=1e-8, abs=1e-12)
    assert found.error == pytest.approx(found.errors[-1], rel=1e-3, abs=1e-6)
    assert found.errors == sorted(found.errors, reverse=True)
    assert found.error <= 1.02 * wide.error + 1e-6
    assert found.error <= plain_descent(W, C, rank, round(0.2 * m * n), 40) + 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_an_error_too_small_for_float32(family: str) -> None:
    m, n = 96, 64
    W, C = torch.randn(m, n), ill_conditioned("rank n/8", n)
    C += 1e-10 * torch.eye(n)  # what S cannot reach: 1e-4 of the norm, more or less
    found = decompose(W, 2, 0.3, family=family, inputs=C, iterations=200)
    assert found.error < 1e-3
    assert found.error == pytest.approx(error_of(W, dense(found), C), rel=1e-8)
    assert found.errors[-1] == pytest.approx(found.error, rel=0.01)


def test_outputs_much_smaller_than_the_weight() -> None:
    m, n = 64, 48
    C = torch.ones(n, n).double() + 1e-10 * second_moments(n)
    W = torch.randn(m, n)
    W -= W.mean(1, keepdim=True)
    found, wide = decompose(W, 4, 0.2, inputs=C), decompose(W.double(), 4, 0.2, inputs=C)
    assert found.error == pytest.approx(error_of(W, dense(found), C), rel=1e-6)
    assert found.errors[-1] == pytest.approx(found.error, rel=1e-3)
    assert found.error <= 1.02 * wide.error


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_may_make_up_for_small_inputs(family: str) -> None:
    m, n = 64, 48
    C, W, size = second_moments(n), torch.randn(m, n), 2.0 ** torch.linspace(-18, 18, n).round()
    wanted = decompose(W, 4, 0.2, family=family, inputs=C).error
    found = decompose(W / size, 4, 0.2, family=family, inputs=C * torch.outer(size, size))
    assert found.error == pytest.approx(wanted, rel=1e-3)
