# SPDX-License-Identifier: Apache-2.0
"""Layers: construction, initialisation, conversion to and from dense ones."""

import copy

import pytest
import torch
from torch import nn

import structmat as sm


def test_forward_and_gradients_match_the_dense_layer() -> None:
    torch.manual_seed(0)
    layer = sm.nn.LowRankLinear(12, 7, rank=3, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    wanted = nn.functional.linear(x, layer.U @ layer.V, layer.bias)
    torch.testing.assert_close(layer(x), wanted)
    inputs = (x, layer.U, layer.V, layer.bias)
    got = torch.autograd.grad(layer(x).square().sum(), inputs)
    for a, b in zip(got, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("n", "m", "rank"), [(512, 512, 4), (256, 1024, 200), (2048, 128, 64)])
def test_initialisation_keeps_the_scale(n: int, m: int, rank: int) -> None:
    torch.manual_seed(0)
    layer = sm.nn.LowRankLinear(n, m, rank)
    y = layer(torch.randn(4096, n))
    assert y.square().mean().sqrt().item() == pytest.approx(1, rel=0.35 if rank < 16 else 0.1)
    assert not layer.bias.any()


def test_from_linear_without_inputs_is_the_truncated_svd() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(20, 33)
    layer = sm.nn.LowRankLinear.from_linear(linear, 6)
    W = linear.weight.detach().double()
    best = torch.linalg.svdvals(W)[6:].square().sum().sqrt()
    error = torch.linalg.norm(W - layer.U.detach().double() @ layer.V.detach().double())
    torch.testing.assert_close(error, best, rtol=1e-5, atol=0)
    assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize(("n", "m"), [(20, 33), (33, 20), (16, 16)])
@pytest.mark.parametrize("rows", [200, 5])
def test_from_linear_with_inputs_has_least_output_error(n: int, m: int, rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(n, m)
    X = torch.randn(rows, n) @ torch.diag(torch.logspace(0, -3, n))
    layer = sm.nn.LowRankLinear.from_linear(linear, 6, inputs=X.reshape(5, -1, n))
    W, X = linear.weight.detach().double(), X.double()
    best = torch.linalg.svdvals(X @ W.T)[6:].square().sum().sqrt()
    error = torch.linalg.norm(X @ (W - layer.U.detach().double() @ layer.V.detach().double()).T)
    scale = torch.linalg.norm(X @ W.T)
    torch.testing.assert_close(error, best, rtol=1e-4, atol=2e-6 * scale.item())


def test_factors_are_nested() -> None:
    torch.manual_seed(0)
    linear, X = nn.Linear(24, 24), torch.randn(100, 24)
    large = sm.nn.LowRankLinear.from_linear(linear, 12, inputs=X)
    small = sm.nn.LowRankLinear.from_linear(linear, 5, inputs=X)
    torch.testing.assert_close(large.U[:, :5] @ large.V[:5], small.U @ small.V)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 24, bias=bias, dtype=dtype).eval()
    layer = sm.nn.LowRankLinear.from_linear(linear, 16)
    back = layer.to_linear()
    assert back.weight.dtype == dtype
    assert not layer.training
    assert not back.training
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(back.weight, linear.weight, rtol=0, atol=4 * unit)
    assert (back.bias is None) == (not bias)


def test_state_and_representation() -> None:
    layer = sm.nn.LowRankLinear(8, 6, rank=2, bias=False)
    assert list(layer.state_dict()) == ["U", "V"]
    assert repr(layer) == "LowRankLinear(in_features=8, out_features=6, rank=2, bias=False)"
    other = sm.nn.LowRankLinear(8, 6, rank=2, bias=False)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_device_and_dtype() -> None:
    layer = sm.nn.LowRankLinear(8, 6, rank=2, device="meta", dtype=torch.bfloat16)
    assert layer.U.is_meta
    assert layer.V.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8, 6, 0), "rank must be from 1 to 6"),
        ((8, 6, 7), "rank must be from 1 to 6 .* got 7"),
        ((0, 6, 1), "sizes must be positive"),
    ],
)
def test_bad_sizes(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sm.nn.LowRankLinear(*sizes)


def test_bad_inputs() -> None:
    linear = nn.Linear(8, 6)
    make = sm.nn.LowRankLinear.from_linear
    with pytest.raises(ValueError, match="rank must be"):
        make(linear, 9)
    with pytest.raises(ValueError, match="n = 8"):
        make(linear, 2, inputs=torch.randn(4, 7))
    with pytest.raises(ValueError, match="at least one row"):
        make(linear, 2, inputs=torch.randn(0, 8))
    with pytest.raises(ValueError, match="inputs have NaN"):
        make(linear, 2, inputs=torch.full((4, 8), torch.nan))
    linear.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="weight has NaN or Inf"):
        make(linear, 2)


def test_compiles_to_one_graph() -> None:
    layer = sm.nn.LowRankLinear(32, 16, rank=4)
    x = torch.randn(5, 32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_weight_is_the_product() -> None:
    torch.manual_seed(0)
    layer = sm.nn.LowRankLinear(12, 7, rank=3, dtype=torch.float64)
    W = layer.U @ layer.V
    assert (layer.weight.dtype, layer.weight.device) == (W.dtype, W.device)
    assert layer.weight.shape == layer.weight.size() == (7, 12)
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight + 0, W)
    x = torch.randn(4, 12, dtype=torch.float64)
    got = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, layer(x))
    wanted = torch.autograd.grad(layer(x).square().sum(), (layer.U, layer.V))
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), (layer.U, layer.V)), wanted, strict=True
    ):
        torch.testing.assert_close(a, b)
    assert "weight" not in dict(layer.named_parameters()) | layer.state_dict()
    with torch.no_grad():
        assert not layer.weight.requires_grad
        with pytest.raises(RuntimeError, match="change U and V instead"):
            layer.weight.zero_()
        with pytest.raises(RuntimeError, match="change U and V instead"):
            layer.weight[0] = 1


def test_reading_its_dtype_computes_nothing() -> None:
    layer = sm.nn.LowRankLinear(1 << 20, 1 << 20, rank=1)  # the product would take 4 TiB
    weight = layer.weight
    assert weight.dtype == torch.float32
    assert (weight.device, weight.shape, weight.is_cuda) == (layer.U.device, (1 << 20,) * 2, False)
    assert weight.is_floating_point()
    assert weight.numel() == 1 << 40


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_runs_the_low_rank_layers(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    sm.compress(model, 0.5, method="svd")
    assert isinstance(model.layers[0].linear1, sm.nn.LowRankLinear)
    dense = copy.deepcopy(model)
    dense.use_nested_tensor = False  # warns that it is a prototype
    for block in dense.layers:
        block.linear1, block.linear2 = block.linear1.to_linear(), block.linear2.to_linear()
    x = torch.randn(3, 5, 32)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    calls: list[nn.Module] = []
    forward = sm.nn.LowRankLinear.forward

    def noted(self: sm.nn.LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return forward(self, x)

    monkeypatch.setattr(sm.nn.LowRankLinear, "forward", noted)
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            got = model(x, src_key_padding_mask=mask)
            wanted = dense(x, src_key_padding_mask=mask)
        real = slice(None) if mask is None else ~mask
        torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-5)
    assert len(calls) == 8


def test_weight_compiles_away() -> None:
    layer = sm.nn.LowRankLinear(32, 16, rank=4)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return layer(x.to(layer.weight.dtype))

    x = torch.randn(5, 32, dtype=torch.float64)
    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cast(x))
