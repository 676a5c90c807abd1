# SPDX-License-Identifier: Apache-2.0
"""Compression of whole models, against double-precision references and published identities."""

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

import structmat as sm  # noqa: E402
from structmat.compress import factor  # noqa: E402
from structmat.compress.allocate import global_ranks, largest_rank, uniform_rank  # noqa: E402
from structmat.compress.compress import compress_each  # noqa: E402

DOUBLE = torch.float64


def bert(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        **{
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 100,
            "max_position_embeddings": 32,
            **options,
        }
    )
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the tiny initial weights: real nonlinearity
            if parameter.ndim == 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_embd=48, n_layer=2, n_head=4, vocab_size=100, n_positions=32, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def batches(count: int = 6, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Ids with padding; its ids differ from call to call so that unmasked padding would show."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 100, (8, 24), generator=generator)
        lengths = torch.randint(5, 25, (8, 1), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(24) < lengths).long()})
    return made


def inputs_of(model: nn.Module, name: str, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Every real row fed to a layer, in double precision."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    for batch in data:
        with torch.no_grad():
            model(**batch)
        seen[-1] = seen[-1][batch["attention_mask"].bool()]
    handle.remove()
    return torch.cat(seen).double()


def dense(layer: nn.Module) -> torch.Tensor:
    return layer.U.detach().double() @ layer.V.detach().double()


LAYER = "encoder.layer.1.attention.self.query"
WIDE = "encoder.layer.0.output.dense"  # n > m: its moment is kept on the output side


@pytest.mark.parametrize("name", [LAYER, WIDE, "encoder.layer.1.intermediate.dense"])
def test_whitened_is_the_best_of_its_rank(name: str) -> None:
    model, data = bert(), batches()
    W = model.get_submodule(name).weight.detach().double()
    X = inputs_of(model, name, data)
    report = sm.compress(model, 0.5, calibration=data, filter="encoder.*")
    layer = model.get_submodule(name)
    # Eckart-Young on the outputs themselves: no rank-r matrix does better.
    tail = torch.linalg.svdvals(X @ W.T)[layer.rank :]
    best = tail.square().sum().sqrt()
    got = torch.linalg.norm(X @ (W - dense(layer)).T)
    torch.testing.assert_close(got, best, rtol=1e-4, atol=0)
    entry = next(x for x in report.layers if x.name == name)
    whole = torch.linalg.norm(X @ W.T)
    assert entry.predicted_error == pytest.approx((best / whole).item(), rel=1e-4)


@pytest.mark.parametrize("method", ["svd", "whitened"])
@pytest.mark.parametrize("ranks", ["uniform", "global"])
def test_predicted_and_measured_errors_agree(method: str, ranks: str) -> None:
    model = bert()
    report = sm.compress(model, 0.5, method=method, ranks=ranks, calibration=batches())
    low = [layer for layer in report.layers if layer.kind == "low_rank"]
    assert low
    for layer in low:
        assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)
        assert layer.errors[-1] == layer.predicted_error
    assert report.kept <= 0.5 + 1e-9


def test_svd_without_data() -> None:
    model = bert()
    W = model.get_submodule(LAYER).weight.detach().double()
    report = sm.compress(model, 0.5, method="svd")
    layer = model.get_submodule(LAYER)
    S = torch.linalg.svdvals(W)
    assert torch.linalg.norm(W - dense(layer)).item() == pytest.approx(
        S[layer.rank :].square().sum().sqrt().item(), rel=1e-5
    )
    assert report.layers[0].measured_error is None
    assert report.calibration_hash is None


def test_singular_covariance() -> None:
    """Inputs in a subspace: exact once the rank reaches its dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48))
    basis = torch.randn(5, 32)
    data = [torch.randn(200, 5) @ basis for _ in range(3)]
    wanted = model(data[0])
    report = sm.compress(model, 0.3, calibration=data)
    assert report.layers[0].rank == 5
    assert report.layers[0].predicted_error < 1e-5
    torch.testing.assert_close(model(data[0]), wanted, rtol=1e-4, atol=1e-4)


def test_two_sided_matches_dense_algebra() -> None:
    torch.manual_seed(0)
    for m, n in [(12, 20), (20, 12), (9, 9)]:
        W, X, G = (torch.randn(*s, dtype=DOUBLE) for s in [(m, n), (50, n), (60, m)])
        R, L = X.T @ X, G.T @ G
        moment = R if factor.on_input_side(W) else W @ R @ W.T
        factors = factor.two_sided(W, moment, L)
        left, right = torch.linalg.cholesky(L), torch.linalg.cholesky(R)
        spectrum = torch.linalg.svdvals(left.T @ W @ right)
        losses = factor.errors(W, factors, moment, L)
        for rank in (0, 1, 4, min(m, n)):
            E = W - factors.U[:, :rank] @ factors.V[:rank]
            direct = torch.trace(L @ E @ R @ E.T)
            torch.testing.assert_close(
                losses[rank], direct, rtol=1e-8, atol=1e-8 * losses[0].item()
            )
            best = spectrum[rank:].square().sum()
            assert direct <= best * 1.01 + 1e-8 * losses[0]  # damped: not below, hardly above
            assert direct >= best * (1 - 1e-8) - 1e-8 * losses[0]


def test_global_ranks_are_optimal_on_small_cases() -> None:
    shapes = [(6, 6), (4, 8), (8, 4)]
    torch.manual_seed(0)
    for _ in range(20):
        losses = []
        for m, n in shapes:
            gains = torch.rand(min(m, n)).sort(descending=True).values.tolist()
            losses.append([sum(gains[r:]) for r in range(len(gains) + 1)])
        budget = 60
        found = global_ranks(shapes, losses, budget, dense=False)
        cost = sum(r * (m + n) for (m, n), r in zip(shapes, found, strict=True))
        value = sum(loss[r] for loss, r in zip(losses, found, strict=True))
        assert cost <= budget
        options = [range(1, largest_rank(m, n) + 1) for m, n in shapes]
        best = min(
            losses[0][a] + losses[1][b] + losses[2][c]
            for a in options[0]
            for b in options[1]
            for c in options[2]
            if (a + b + c) * 12 <= cost
        )
        assert value == pytest.approx(best)  # all costs are equal here: greedy is exact


def test_global_beats_uniform_at_equal_weights() -> None:
    data, held_out = batches(12), batches(6, seed=9)
    original = bert()
    errors = {}
    for ranks in ("uniform", "global"):
        model = copy.deepcopy(original)
        report = sm.compress(model, 0.5, ranks=ranks, calibration=data, filter="encoder.*")
        assert report.kept <= 0.5 + 1e-9
        error = 0.0
        for batch in held_out:
            mask = batch["attention_mask"].bool()
            with torch.no_grad():
                difference = model(**batch)[0] - original(**batch)[0]
            error += difference[mask].double().square().sum().item()
        errors[ranks] = error
    assert errors["global"] < 0.97 * errors["uniform"]


@pytest.mark.parametrize("ranks", ["uniform", "global"])
def test_padding_does_not_count(ranks: str) -> None:
    data = batches()
    other = [dict(batch) for batch in data]
    for batch in other:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        batch["input_ids"] = torch.where(mask.bool(), ids, 7)
        if ranks == "uniform":  # the random projections of global ranks depend on the shape
            batch["input_ids"] = torch.cat([batch["input_ids"], ids[:, :5]], 1)
            batch["attention_mask"] = torch.cat([mask, torch.zeros_like(mask[:, :5])], 1)
    a, b = bert(), bert()
    for model, calibration in ((a, data), (b, other)):
        sm.compress(model, 0.5, ranks=ranks, calibration=calibration, filter="encoder.*")
    for name in (LAYER, WIDE):
        x, y = a.get_submodule(name), b.get_submodule(name)
        assert x.rank == y.rank
        torch.testing.assert_close(dense(x), dense(y), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["whitened", "fisher", "svd"])
def test_several_sizes_at_once_are_those_one_by_one(method: str) -> None:
    model, data = bert(), batches()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options: dict[str, Any] = {"method": method, "calibration": data}
    if method == "fisher":
        options["objective"] = lambda output, batch: output.last_hidden_state.square().sum()
    sizes = compress_each(model, [0.7, 0.4], **options)
    for keep, (small, report) in zip([0.7, 0.4], sizes, strict=True):
        alone = bert()
        expected = sm.compress(alone, keep, ranks="global", **options)
        assert [x.rank for x in report.layers] == [x.rank for x in expected.layers]
        for got, want in zip(report.layers, expected.layers, strict=True):
            assert got.measured_error == pytest.approx(want.measured_error)
        for (name, got), want in zip(small.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(got, want), name
            assert got.requires_grad
            assert all(got is not p for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_several_sizes_at_once_share_biases_and_fail_alike() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    model[2].bias = model[0].bias
    data = [torch.randn(64, 16)]
    [(small, _)] = compress_each(model, [0.5], calibration=data)
    assert small[2].bias is small[0].bias
    assert small[0].bias is not model[0].bias
    for keeps in ([0.5, 1.5], [0.5, 0.001]):
        with pytest.raises(ValueError, match="keep"):
            compress_each(model, keeps, calibration=data)


def test_same_seed_same_bytes() -> None:
    states = []
    for _ in range(2):
        model = bert()
        sm.compress(model, 0.5, ranks="global", calibration=batches, seed=3)
        states.append(model.state_dict())
    for x, y in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(x, y)


def test_calibration_forms_are_the_same() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16))
    x = torch.randn(64, 16)
    forms: list[Any] = [[x], [(x,)], [{"input": x}], iter([x]), lambda: iter([x])]
    weights = []
    for form in forms:
        model = copy.deepcopy(base)
        sm.compress(model, 0.5, calibration=form)
        weights.append(dense(model[0]))
    for weight in weights[1:]:
        assert torch.equal(weight, weights[0])


def test_conv1d_and_tied_head() -> None:
    model = gpt2()
    data = batches()
    report = sm.compress(model, 0.5, ranks="global", calibration=data)
    assert isinstance(model.transformer.h[0].attn.c_attn, sm.nn.LowRankLinear)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all("lm_head" not in layer.name for layer in report.layers)
    for layer in report.layers:
        if layer.rank:
            assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with transformer\.wte"):
        sm.compress(gpt2(), 0.5, method="svd", filter="lm_head")


def test_tied_layers_stay_tied() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU())
    model[2].weight = model[0].weight
    model.append(model[0])  # the same module in two places
    data = [torch.randn(100, 24)]
    report = sm.compress(model, 0.5, calibration=data)
    assert len(report.layers) == 1
    assert report.layers[0].places == ["0", "2", "4"]
    assert model[0].U is model[2].U
    assert model[4] is model[0]
    assert model[2].bias is not model[0].bias
    assert report.layers[0].measured_error == pytest.approx(
        report.layers[0].predicted_error, rel=1e-3
    )


def test_fisher() -> None:
    """W' minimises the column-weighted error, the weights being squared gradients by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))
    X = torch.randn(40, 16) * torch.linspace(0.1, 2, 16)
    W = model[0].weight.detach().double()
    weights = torch.zeros(16, dtype=DOUBLE)
    reference = copy.deepcopy(model).double()
    for x in X.double():
        reference.zero_grad()
        reference(x).square().sum().backward()
        weights += reference[0].weight.grad.square().sum(0)
    sm.compress(
        model,
        0.5,
        method="fisher",
        calibration=[X],
        objective=lambda output, batch: output.square().sum(),
        filter="0",
    )
    E = (W - dense(model[0])) * weights.sqrt()
    best = torch.linalg.svdvals(W * weights.sqrt())[model[0].rank :].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.norm(E), best, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = bert().to(dtype)
    report = sm.compress(model, 0.5, calibration=batches(), filter="encoder.*")
    layer = model.get_submodule(LAYER)
    assert layer.U.dtype == dtype
    for entry in report.layers:
        assert entry.measured_error == pytest.approx(entry.predicted_error, rel=0.05)


def test_flags_and_hooks_are_as_before() -> None:
    model = bert().train()
    model.get_submodule(LAYER).weight.requires_grad_(False)
    sm.compress(model, 0.5, calibration=batches(), filter=["encoder.*.query"])
    layer = model.get_submodule(LAYER)
    assert layer.training
    assert not layer.U.requires_grad
    assert layer.bias.requires_grad
    for module in model.modules():
        assert not module._forward_hooks
    other = model.get_submodule("encoder.layer.0.attention.self.query")
    assert other.U.requires_grad
    assert type(model.get_submodule(WIDE)) is nn.Linear


def test_small_layers_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 1))
    report = sm.compress(model, 0.5, method="svd")
    assert [layer.kind for layer in report.layers] == ["low_rank", "dense"]
    assert type(model[1]) is nn.Linear
    assert uniform_rank(32, 1, 0.5) is None
    assert report.layers[1].params_after == 32


def test_report_reads_well() -> None:
    report = sm.compress(bert(), 0.5, calibration=batches())
    text = str(report)
    assert "whitened, uniform ranks" in text
    assert LAYER in text
    plain = report.to_dict()
    assert plain["layers"][0]["spectrum"] == sorted(plain["layers"][0]["spectrum"], reverse=True)
    assert report.seconds > 0
    assert len(report.calibration_hash) == 64
    assert report.tokens == sum(int(b["attention_mask"].sum()) for b in batches())


@pytest.mark.parametrize("ranks", ["uniform", "global"])
def test_sequential(ranks: str) -> None:
    """Better than one shot on the data, and every error as predicted from the moments."""
    data, original = batches(12), bert()
    errors = []
    for sequential in (False, True):
        model = copy.deepcopy(original)
        report = sm.compress(
            model, 0.4, ranks=ranks, sequential=sequential, calibration=data, filter="encoder.*"
        )
        error = 0.0
        for batch in data:
            with torch.no_grad():
                difference = model(**batch)[0] - original(**batch)[0]
            error += difference[batch["attention_mask"].bool()].double().square().sum().item()
        errors.append(error)
        assert report.kept <= 0.4
        for layer in report.layers:
            if layer.rank:
                assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)
    assert errors[1] < {"uniform": 0.9, "global": 0.97}[ranks] * errors[0]
    # What the report calls measured is what an outsider sees between the two models.
    X, X2 = inputs_of(original, WIDE, data), inputs_of(model, WIDE, data)
    Y = X @ original.get_submodule(WIDE).weight.detach().double().T
    Y2 = X2 @ dense(model.get_submodule(WIDE)).T
    entry = next(layer for layer in report.layers if layer.name == WIDE)
    error = torch.linalg.norm(Y - Y2) / torch.linalg.norm(Y)
    assert entry.measured_error == pytest.approx(error.item(), rel=1e-4)


def test_regression_matches_alternating_least_squares() -> None:
    """Reduced-rank regression in closed form against iterations on (U, V), in double precision."""
    torch.manual_seed(0)
    W = torch.randn(10, 14, dtype=DOUBLE)
    X = torch.randn(300, 14, dtype=DOUBLE)
    X2 = X + 0.3 * torch.randn(300, 14, dtype=DOUBLE)
    found = factor.regressed(W, X2.T @ X2, X.T @ X2, 4)
    ridge = 1e-2 * X2.square().sum() / 14 * torch.eye(14, dtype=DOUBLE)
    U = torch.randn(10, 4, dtype=DOUBLE)
    # The ridge pulls towards W: the same problem with extra rows whose target is W's own output.
    rows = torch.cat([X2, torch.linalg.cholesky(ridge).T])
    target = torch.cat([X @ W.T, torch.linalg.cholesky(ridge).T @ W.T])
    star = torch.linalg.lstsq(rows, target).solution.T
    for _ in range(500):  # on W* in the norm of the inputs, as the closed form states
        V = torch.linalg.lstsq(U, star).solution
        U = torch.linalg.lstsq((X2 @ V.T), X2 @ star.T).solution.T
    torch.testing.assert_close(found.U @ found.V, U @ V, rtol=1e-5, atol=1e-5)
    errors = factor.regression_errors(
        W, found, X2.T @ X2, X.T @ X2, (X @ W.T).square().sum().item()
    )
    direct = (X @ W.T - X2 @ (found.U @ found.V).T).square().sum()
    torch.testing.assert_close(errors[-1], direct)


def nan_weight(model: nn.Module) -> None:
    model.get_submodule(LAYER).weight.data[0, 0] = float("nan")


def nan_embedding(model: nn.Module) -> None:
    model.embeddings.word_embeddings.weight.data[5] = float("nan")


@pytest.mark.parametrize(
    ("options", "spoil", "message"),
    [
        ({"keep": 0}, None, "keep must lie between 0 and 1"),
        ({"keep": 1.5}, None, "keep must lie between 0 and 1"),
        ({"method": "magic"}, None, "method must be one of"),
        ({"ranks": "magic"}, None, "ranks must be one of"),
        ({"method": "svd", "sequential": True}, None, "sequential goes with"),
        ({"iterations": 3}, None, "iterations goes with"),
        ({"method": "sparse_low_rank", "iterations": 0}, None, "iterations is 0"),
        ({"calibration": None}, None, "needs calibration"),
        ({"calibration": []}, None, "calibration is empty"),
        ({"filter": "decoder.*"}, None, "no layer matched"),
        ({"method": "fisher"}, None, "needs a loss"),
        ({"ranks": "global", "objective": lambda o, b: o[0].detach()}, None, "objective must"),
        ({}, nan_weight, "query has NaN or Inf"),
        ({}, nan_embedding, "activations of .* have NaN or Inf"),
    ],
)
def test_errors_leave_the_model_alone(options: dict[str, Any], spoil: Any, message: str) -> None:
    model = bert()
    if spoil:
        spoil(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        sm.compress(model, **{"keep": 0.5, "calibration": batches(), **options})
    assert dict(model.named_modules()) == modules
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_that_no_batch_reaches() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match="no calibration batch reaches unused"):
        sm.compress(Branch(), 0.5, calibration=[torch.randn(8, 16)])


def test_weighting_of_low_rank_is_completed_by_the_weight() -> None:
    torch.manual_seed(0)
    W, X = (
        torch.randn(10, 8, dtype=DOUBLE),
        torch.randn(50, 2, dtype=DOUBLE) @ torch.randn(2, 8, dtype=DOUBLE),
    )
    best = torch.linalg.svdvals(W)[4:].square().sum().sqrt()
    for factors in (
        factor.fisher(W, torch.zeros(8)),
        factor.whitened(W, torch.zeros(8, 8).double()),
    ):
        error = torch.linalg.norm(W - factors.U[:, :4] @ factors.V[:4])
        torch.testing.assert_close(error, best)
    factors = factor.whitened(W, X.T @ X)
    Q = torch.linalg.qr(W @ X.T[:, :2]).Q
    rest = torch.linalg.svdvals(W - Q @ Q.T @ W)[2:].square().sum().sqrt()
    error = torch.linalg.norm(W - factors.U[:, :4] @ factors.V[:4])
    torch.testing.assert_close(error, rest)


def test_balanced_factors_are_the_same_product() -> None:
    torch.manual_seed(0)
    factors = factor.svd(torch.randn(64, 32))
    even = factors.balanced()
    assert torch.equal(even.U @ even.V, factors.U @ factors.V)
    assert even.U.square().mean(0).sqrt().sub(1).abs().max() < 0.5
    kept = factors.kept(4, torch.float16)
    assert kept.U.untyped_storage().nbytes() == 64 * 4 * 2


class Writes(nn.Module):
    """Writes to what its layers were fed and to what they returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.a(x)
        return self.b(x).relu_()


@pytest.mark.parametrize("ranks", ["uniform", "global"])
@pytest.mark.parametrize("sequential", [False, True])
def test_models_that_write_in_place(ranks: str, sequential: bool) -> None:
    torch.manual_seed(0)
    model, data = Writes(), [torch.randn(60, 16) for _ in range(3)]
    before = [x.clone() for x in data]
    report = sm.compress(model, 0.5, ranks=ranks, sequential=sequential, calibration=data)
    for layer in report.layers:
        if layer.rank:
            assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)
    assert all(torch.equal(x, y) for x, y in zip(data, before, strict=True))


def test_model_that_wants_its_own_layers_stays() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not isinstance(self.a, nn.Linear):
                raise TypeError("a is no nn.Linear")
            return self.a(x)

    model = Strict()
    with pytest.raises(ValueError, match=r"fails on the calibration data.*no nn\.Linear"):
        sm.compress(model, 0.5, calibration=[torch.randn(8, 16)])
    assert type(model.a) is nn.Linear


def test_encoder_decoder_masks() -> None:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    model = transformers.T5Model(config).eval()
    ids = torch.randint(1, 50, (4, 12))
    mask = (torch.arange(12) < torch.tensor([[3], [12], [5], [7]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    from structmat.compress.calibrate import Masks
    from structmat.compress.layers import Target

    for extra in ({}, {"decoder_attention_mask": 1 - mask}):
        masks = Masks(model, batch | extra)
        place = lambda name: Target({name: model.get_submodule(name)})  # noqa: E731
        assert torch.equal(masks.of(place("encoder.block.0.layer.0.SelfAttention.q")), mask.bool())
        own = masks.of(place("decoder.block.0.layer.0.SelfAttention.q"))
        assert torch.equal(own, ~mask.bool()) if extra else own is None
        assert masks.of(place("decoder.block.0.layer.1.EncDecAttention.k")) is None


def test_small_errors_are_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    basis = torch.randn(8, 64)
    data = [torch.randn(5000, 8) @ basis + 2e-4 * torch.randn(5000, 64) for _ in range(2)]
    layer = sm.compress(model, 0.3, calibration=data).layers[0]
    assert layer.measured_error < 5e-4
    assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)


def test_large_activations() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False))
    layer = sm.compress(model, 0.5, calibration=[1e20 * torch.randn(50, 16)]).layers[0]
    assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)


def test_calls_that_are_mistakes() -> None:
    x = torch.randn(8, 16)
    make = lambda: nn.Sequential(nn.Linear(16, 16))  # noqa: E731
    for bad in (x, {"input": x}, "text", ["text"]):
        with pytest.raises(TypeError, match="list of batches"):
            sm.compress(make(), 0.5, calibration=bad)
    spent = iter([x])
    with pytest.raises(ValueError, match="1 batches at first and 0"):
        sm.compress(make(), 0.5, calibration=lambda: spent)
    with pytest.raises(ValueError, match="no parameters"):
        sm.compress(nn.Sequential(nn.ReLU()), 0.5, method="svd")
    with pytest.raises(ValueError, match="from_linear"):
        sm.compress(nn.Linear(16, 16), 0.5, method="svd")
    for patterns in (["0", "mistyped.*"], (name for name in ("0", "mistyped.*")), "mistyped.*"):
        with pytest.raises(ValueError, match=r"no layer matched filter 'mistyped\.\*'"):
            sm.compress(make(), 0.5, method="svd", filter=patterns)
    with pytest.raises(ValueError, match="no layer passed filter"):
        sm.compress(make(), 0.5, method="svd", filter=lambda name, module: False)
    with torch.inference_mode():
        sm.compress(make(), torch.tensor(0.5).numpy()[()], calibration=[torch.randn(8, 16)])
