# SPDX-License-Identifier: Apache-2.0
"""Monarch and block-diagonal layers: construction, initialisation, conversion, use in models."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.nn.blocks import Blocks
from structmat.nn.monarch import _default_blocks

MonarchLinear, BlockDiagonalLinear = sm.nn.MonarchLinear, sm.nn.BlockDiagonalLinear
SIZES = [(12, 8, 4), (12, 20, 4), (13, 11, 4), (7, 9, 5), (5, 5, 5), (6, 9, 1)]  # in, out, blocks


def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight entry by entry from the layer's formula, its real features picked out."""
    N = layer.n_blocks
    if isinstance(layer, MonarchLinear):
        W = torch.einsum("jlkr,kjri->jlki", layer.W2, layer.W1)
    else:
        W = torch.einsum("kqp,kj->kqjp", layer.W, torch.eye(N, dtype=layer.W.dtype))
    rows, columns = (
        [b * W.shape[axis] + i for b in range(N) for i in range(size // N + (b < size % N))]
        for size, axis in ((layer.out_features, 1), (layer.in_features, 3))
    )
    return W.flatten(2).flatten(0, 1)[rows][:, columns]


def make(kind: str, n: int, m: int, blocks: int, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return (MonarchLinear if kind == "monarch" else BlockDiagonalLinear)(n, m, blocks, **kwargs)


KINDS = pytest.mark.parametrize("kind", ["monarch", "diagonal"])


@KINDS
@pytest.mark.parametrize(("n", "m", "blocks"), SIZES)
def test_forward_and_gradients_match_the_dense_layer(
    kind: str, n: int, m: int, blocks: int
) -> None:
    layer = make(kind, n, m, blocks, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    for x in (torch.randn(4, 5, n), torch.randn(n), torch.randn(0, n)):
        x = x.double().requires_grad_()
        wanted = nn.functional.linear(x, dense_weight(layer), layer.bias)
        got = layer(x)
        torch.testing.assert_close(got, wanted)
        assert got.is_contiguous()
        inputs = (x, *layer.parameters())
        gradients = torch.autograd.grad(got.square().sum(), inputs)
        for a, b in zip(gradients, torch.autograd.grad(wanted.square().sum(), inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_any_device_and_dtype(backend, dtype: torch.dtype) -> None:
    layer = MonarchLinear(12, 9, 3, device=backend.device, dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(5, 12, device=backend.device, dtype=dtype)
    wanted = nn.functional.linear(x.double(), dense_weight(layer.double()))
    got = layer.to(dtype)(x)
    assert (got.dtype, got.device) == (x.dtype, x.device)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), wanted, rtol=8 * eps, atol=8 * eps)


@pytest.mark.parametrize(
    ("n", "m", "blocks", "rank"),
    [(512, 512, 8, None), (256, 1024, 16, 1), (2048, 128, 4, None), (1000, 700, 26, 3)],
)
def test_initialisation_keeps_the_scale(n: int, m: int, blocks: int, rank: int | None) -> None:
    layer = make("monarch", n, m, blocks, rank=rank)
    x = torch.randn(1024, n)
    h = torch.einsum(
        "kjri,tki->tkjr", layer.W1, Blocks(n, blocks).pad(x).unflatten(1, (blocks, -1))
    )
    for values in (h, layer(x)):
        assert values.square().mean().sqrt().item() == pytest.approx(1, rel=0.1)
    assert not layer.bias.any()
    diagonal = make("diagonal", n, m, blocks)
    assert diagonal(x).square().mean().sqrt().item() == pytest.approx(1, rel=0.1)


@KINDS
def test_padding_stays_zero_in_training(kind: str) -> None:
    layer = make(kind, 13, 11, 4)
    before = sum(int((p == 0).sum()) for p in layer.parameters() if p.dim() > 1)
    # Blocks of 4 and of 3 inputs (3 short ones), of 3 and of 2 outputs (1 short one), rank 1.
    assert before == (3 * 4 + 1 * 4 if kind == "monarch" else 3 * 3 + 1 * 4 - 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 13)).square().sum().backward()
        optimizer.step()
    assert sum(int((p == 0).sum()) for p in layer.parameters() if p.dim() > 1) == before


@pytest.mark.parametrize(("size", "count"), [(12, 4), (13, 4), (5, 5), (11, 8), (1, 1)])
def test_blocks_are_as_equal_as_can_be(size: int, count: int) -> None:
    blocks = Blocks(size, count)
    padded = blocks.pad(torch.arange(1, size + 1))
    sizes = (padded.unflatten(0, (count, -1)) > 0).sum(1)
    assert sizes.max() - sizes.min() <= 1
    assert torch.equal(padded[padded > 0], torch.arange(1, size + 1))
    assert torch.equal(blocks.cut(padded), torch.arange(1, size + 1))


@pytest.mark.parametrize(
    ("n", "m", "blocks"),
    [
        (1024, 1024, 16),  # blocks of 64
        (768, 3072, 12),
        (3072, 768, 12),
        (4096, 4096, 64),
        (8192, 8192, 64),  # blocks of 128: 128 blocks would be more weights than 90
        (4096, 11008, 32),  # of 128 and 344
        (1000, 1000, 25),  # of 40
        (768, 50257, 12),  # 50257 has no divisor to use
        (256, 256, 8),  # of 32: 4 blocks of 64 would be half of the weights
        (128, 128, 4),
        (10, 10, 3),  # too small for four
        (512, 2, 1),
        (1, 1, 1),
    ],
)
def test_default_block_count(n: int, m: int, blocks: int) -> None:
    assert _default_blocks(n, m) == blocks
    layer = MonarchLinear(n, m, device="meta")
    assert layer.n_blocks == blocks
    hidden = layer.rank * blocks**2
    assert min(n, m) <= hidden < min(n, m) + blocks**2


@KINDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "m", "blocks"), [(12, 20, 4), (13, 11, 4)])
def test_dense_and_back(
    kind: str, bias: bool, n: int, m: int, blocks: int, dtype: torch.dtype
) -> None:
    layer = make(kind, n, m, blocks, bias=bias, dtype=dtype).eval()
    if bias:
        nn.init.normal_(layer.bias)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    assert linear.weight.dtype == dtype
    assert not linear.training
    eps = torch.finfo(dtype).eps
    wanted = dense_weight(copy.deepcopy(layer).double())
    torch.testing.assert_close(linear.weight.double(), wanted, rtol=eps, atol=eps)
    again = type(layer).from_linear(linear, blocks)  # has a weight of the right structure
    assert not again.training
    torch.testing.assert_close(again.to_linear().weight, linear.weight, rtol=8 * eps, atol=8 * eps)
    assert (again.bias is None) == (not bias)
    if bias:
        assert torch.equal(again.bias, layer.bias)


@pytest.mark.parametrize(("n", "m"), [(16, 24), (13, 11)])
def test_from_linear_is_the_best_in_every_block(n: int, m: int) -> None:
    linear = nn.Linear(n, m, dtype=torch.float64)
    layer = MonarchLinear.from_linear(linear, 4, rank=2)
    error = (linear.weight - dense_weight(layer)).square().sum()
    rows = linear.weight.detach().tensor_split(4, 0)
    blocks = [block for row in rows for block in row.tensor_split(4, 1)]
    wanted = sum(torch.linalg.svdvals(block)[2:].square().sum() for block in blocks)
    torch.testing.assert_close(error, wanted)
    full = MonarchLinear.from_linear(linear, 4, rank=min(-(-n // 4), -(-m // 4)))
    torch.testing.assert_close(dense_weight(full), linear.weight)


def test_from_linear_with_inputs_is_better_on_them() -> None:
    linear = nn.Linear(13, 18)
    X = torch.randn(200, 13) @ torch.diag(torch.logspace(0, -2, 13))
    plain = MonarchLinear.from_linear(linear, 3)
    fitted = MonarchLinear.from_linear(linear, 3, inputs=X.reshape(5, 40, 13))
    error = [torch.linalg.norm(layer(X) - linear(X)).item() for layer in (plain, fitted)]
    assert error[1] < 0.9 * error[0]


def test_diagonal_blocks_are_kept() -> None:
    linear = nn.Linear(13, 11)
    layer = BlockDiagonalLinear.from_linear(linear, 4)
    W = layer.to_linear().weight
    assert torch.equal(W, torch.where(W == 0, 0, linear.weight))
    assert int((W != 0).sum()) == 4 * 3 + 3 * 3 * 2 + 3 * 2


def test_layers_do_not_share_memory_with_the_dense_one() -> None:
    linear = nn.Linear(8, 8)
    for layer in (MonarchLinear.from_linear(linear, 2), BlockDiagonalLinear.from_linear(linear, 1)):
        before = layer(torch.ones(8)).clone()
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.zero_()
        assert torch.equal(layer(torch.ones(8)), before)


@KINDS
def test_state_copies_and_representation(kind: str) -> None:
    layer = make(kind, 13, 6, 3, bias=False)
    if kind == "monarch":
        assert list(layer.state_dict()) == ["W1", "W2"]
        text = "MonarchLinear(in_features=13, out_features=6, n_blocks=3, rank=1, bias=False)"
    else:
        assert list(layer.state_dict()) == ["W"]
        text = "BlockDiagonalLinear(in_features=13, out_features=6, n_blocks=3, bias=False)"
    assert repr(layer) == text
    other = type(layer)(13, 6, 3, bias=False)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 13)
    for again in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(layer(x), again(x))


@KINDS
def test_moves_like_any_module(kind: str) -> None:
    layer = make(kind, 13, 6, 3)
    assert layer.to(torch.float64)(torch.randn(2, 13).double()).dtype == torch.float64
    empty = make(kind, 13, 6, 3, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in empty.parameters())
    assert empty(torch.randn(2, 13, device="meta", dtype=torch.bfloat16)).shape == (2, 6)
    empty.to_empty(device="cpu").reset_parameters()
    assert empty(torch.randn(2, 13, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8, 6, 0, None), "n_blocks must be from 1 to 6 .* got 0"),
        ((8, 6, 7, None), "n_blocks must be from 1 to 6 .* got 7"),
        ((0, 6, 1, None), "sizes must be positive"),
        ((8, 6, 2, 0), "rank must be from 1 to 3 for blocks of 3 x 4, got 0"),
        ((8, 6, 2, 4), "rank must be from 1 to 3"),
    ],
)
def test_bad_sizes(arguments: tuple[int, int, int, int | None], message: str) -> None:
    *sizes, rank = arguments
    with pytest.raises(ValueError, match=f"MonarchLinear: {message}"):
        MonarchLinear(*sizes, rank=rank)
    if "rank" not in message:
        with pytest.raises(ValueError, match=f"BlockDiagonalLinear: {message}"):
            BlockDiagonalLinear(*sizes)


def test_bad_inputs() -> None:
    linear = nn.Linear(8, 6)
    make = MonarchLinear.from_linear
    with pytest.raises(ValueError, match="n_blocks must be"):
        make(linear, 9)
    with pytest.raises(ValueError, match="rank must be"):
        make(linear, 2, rank=9)
    with pytest.raises(ValueError, match="n = 8"):
        make(linear, 2, inputs=torch.randn(4, 7))
    with pytest.raises(ValueError, match="at least one row"):
        make(linear, 2, inputs=torch.randn(0, 8))
    with pytest.raises(ValueError, match="inputs have NaN"):
        make(linear, 2, inputs=torch.full((4, 8), torch.nan))
    linear.weight.data[0, 0] = torch.inf
    for kind in (MonarchLinear, BlockDiagonalLinear):
        with pytest.raises(ValueError, match="weight has NaN or Inf"):
            kind.from_linear(linear, 2)
    with pytest.raises(ValueError, match="x has 7 columns"):
        MonarchLinear(8, 6, 2)(torch.randn(3, 7))
    with pytest.raises(TypeError, match="float64"):
        MonarchLinear(8, 6, 2)(torch.randn(3, 8, dtype=torch.float64))
    for kind in (MonarchLinear, BlockDiagonalLinear):
        layer, name = kind(13, 11, 4), kind.__name__
        for wrong in (torch.randn(3, 12), torch.randn(3, 16), torch.randn(0)):
            with pytest.raises(ValueError, match=f"{name}: x has .* columns, wanted .* = 13"):
                layer(wrong)
        with pytest.raises(TypeError, match=f"{name}: x must be a tensor, got list"):
            layer([1.0])
        with pytest.raises(ValueError, match=f"{name}: x must have at least 1 dimension"):
            layer(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MonarchLinear(16, 16, True), "MonarchLinear: n_blocks must be an integer"),
        (lambda: MonarchLinear(16, 16.0), "MonarchLinear: out_features must be an integer"),
        (lambda: MonarchLinear(16, 16, "4"), "MonarchLinear: n_blocks must .* got str"),
        (lambda: MonarchLinear(16, 16, 4, rank=1.0), "MonarchLinear: rank must .* got float"),
        (lambda: MonarchLinear(None, 16), "MonarchLinear: in_features must .* got NoneType"),
        (lambda: MonarchLinear(16, 16, dtype=torch.int8), "MonarchLinear: dtype is torch.int8"),
        (lambda: BlockDiagonalLinear(16, 16, True), "BlockDiagonalLinear: n_blocks must .* bool"),
        (lambda: BlockDiagonalLinear(16, 16, None), "BlockDiagonalLinear: n_blocks must .* None"),
        (
            lambda: BlockDiagonalLinear(16, 16, 4, dtype=torch.complex64),
            "BlockDiagonalLinear: dtype is torch.complex64",
        ),
        (lambda: sm.nn.LowRankLinear(16, 16, True), "LowRankLinear: rank must be an integer"),
        (lambda: sm.nn.LowRankLinear(16, 16, 4, dtype=torch.int8), "LowRankLinear: dtype is"),
        (lambda: MonarchLinear.from_linear(torch.ones(4, 4)), "MonarchLinear.from_linear: linear"),
        (lambda: BlockDiagonalLinear.from_linear(nn.Identity(), 2), "got Identity"),
        (lambda: sm.nn.LowRankLinear.from_linear("W", 2), "LowRankLinear.from_linear: .* got str"),
        (
            lambda: MonarchLinear.from_linear(nn.Linear(4, 4), inputs=[1.0]),
            "MonarchLinear.from_linear: inputs must be a tensor, got list",
        ),
    ],
)
def test_bad_types(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_bias_is_accepted_by_position() -> None:
    assert MonarchLinear(16, 16, 4, False).bias is None
    assert BlockDiagonalLinear(16, 16, 4, False).bias is None


@pytest.mark.parametrize(("n", "m", "rank"), [(48, 48, 12), (13, 11, 3)])
def test_few_inputs_lose_nothing_that_the_rank_can_hold(n: int, m: int, rank: int) -> None:
    linear = nn.Linear(n, m)
    layer = MonarchLinear.from_linear(linear, 4, rank=rank, inputs=torch.randn(3, n))
    torch.testing.assert_close(layer.to_linear().weight, linear.weight)


@KINDS
@pytest.mark.parametrize(("n", "m"), [(12, 8), (13, 11)])
def test_compiles_to_one_graph(kind: str, n: int, m: int) -> None:
    layer = make(kind, n, m, 4)

    def cast(x: torch.Tensor) -> torch.Tensor:
        return layer(x.to(layer.weight.dtype))

    x = torch.randn(5, n, dtype=torch.float64)
    compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), cast(x))
    wanted = torch.autograd.grad(cast(x).square().sum(), [*layer.parameters()])
    got = torch.autograd.grad(compiled(x).square().sum(), [*layer.parameters()])
    torch.testing.assert_close(got, wanted)


@KINDS
@pytest.mark.parametrize(("n", "m"), [(12, 8), (13, 11)])
def test_weight_is_the_product(kind: str, n: int, m: int) -> None:
    layer = make(kind, n, m, 4, dtype=torch.float64)
    W = dense_weight(layer)
    assert (layer.weight.dtype, layer.weight.device) == (W.dtype, W.device)
    assert layer.weight.shape == (m, n)
    assert layer.weight.requires_grad
    torch.testing.assert_close(layer.weight + 0, W)
    factors = [p for name, p in layer.named_parameters() if name != "bias"]
    got = torch.autograd.grad(layer.weight.square().sum(), factors)
    torch.testing.assert_close(got, torch.autograd.grad(W.square().sum(), factors))
    copied = torch.zeros(m, n, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(copied.copy_(layer.weight), W)
        with pytest.raises(RuntimeError, match="weight is made of other parameters"):
            layer.weight.zero_()
        with pytest.raises(RuntimeError, match="instead"):
            torch.add(W, W, out=layer.weight)


def test_reading_its_dtype_computes_nothing() -> None:
    layer = MonarchLinear(1 << 20, 1 << 20, 1 << 10, device="meta")
    assert layer.weight.dtype == torch.float32
    assert layer.weight.numel() == 1 << 40
    assert layer.W1.numel() == 1 << 30


@pytest.mark.parametrize("padded", [False, True])
def test_inside_a_transformer_encoder_layer(padded: bool) -> None:
    model = nn.TransformerEncoderLayer(16, 2, 30, batch_first=True).eval()
    model.linear1 = MonarchLinear(16, 30, 4)
    model.linear2 = BlockDiagonalLinear(30, 16, 4)
    dense = copy.deepcopy(model)
    dense.linear1, dense.linear2 = model.linear1.to_linear(), model.linear2.to_linear()
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]]) if padded else None
    for gradient in (True, False):
        with torch.set_grad_enabled(gradient):
            got, wanted = (net(x, src_key_padding_mask=mask) for net in (model, dense))
        real = slice(None) if mask is None else ~mask
        torch.testing.assert_close(got[real], wanted[real], rtol=1e-4, atol=1e-5)


@KINDS
def test_training_finds_a_matrix_of_the_structure(kind: str) -> None:
    target = make(kind, 26, 22, 4)
    torch.manual_seed(1)
    layer = type(target)(26, 22, 4)
    x = torch.randn(256, 26)
    y = target(x).detach()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.5
    assert losses[-1] < 0.02 * losses[0]
    assert math.isfinite(sum(losses))
