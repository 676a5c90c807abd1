# SPDX-License-Identifier: Apache-2.0
"""SparseLowRankLinear: construction, conversion, saving, reselection."""

import copy

import pytest
import torch
from torch import nn

import structmat as sm

FAMILIES = ("uniform", "columns", "vector16", "block16")
Layer = sm.nn.SparseLowRankLinear


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("init", ["sltrain", "lost"])
@pytest.mark.parametrize(("rank", "density"), [(3, 0.2), (0, 0.2), (3, 0.0), (3, 1.0)])
def test_forward_saving_and_devices(family: str, init: str, rank: int, density: float) -> None:
    layer = Layer(40, 33, rank, density, family=family, init=init, dtype=torch.float64)
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    want = x @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert list(state) == ["U", "V", "values", "bias", "starts", "columns"]
    like = {"family": family, "seed": 5, "dtype": torch.float64}
    used = Layer(40, 33, rank, density, **like)
    used(x.clone().requires_grad_()).sum().backward()  # has transposed its own support
    used.load_state_dict(state)
    empty = Layer(40, 33, rank, density, device="meta", **like)
    empty.load_state_dict(state, assign=True)
    for other in (used, empty, copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
        assert other.pattern == layer.pattern
        dx = [torch.autograd.grad(a(t := x.clone().requires_grad_()).sum(), t)[0]
              for a in (layer, other)]  # fmt: skip
        assert torch.equal(*dx)
    late = Layer(40, 33, rank, density, device="meta", **like).to_empty(device="cpu")
    late.reset_parameters()
    assert late(x).isfinite().all()
    if init == "sltrain":
        assert late.pattern == Layer(40, 33, rank, density, **like).pattern


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_beside_a_frozen_layer(narrow: torch.dtype, tmp_path) -> None:
    linear = nn.Linear(40, 33, dtype=narrow)
    layer = Layer.beside(linear, 3, 0.1, seed=1, dtype=torch.float32)
    x = torch.randn(2, 3, 40)
    want = x @ linear.weight.float().T + linear.bias.float()
    torch.testing.assert_close(layer(x), want)
    assert layer.base.data_ptr() == linear.weight.data_ptr()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):  # U is zero in the first
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.base, linear.weight)
    assert all(p.grad.any() for name, p in layer.named_parameters() if name != "base")
    W = linear.weight.double() + layer.U.double() @ layer.V.double()
    W += layer.pattern.scatter(layer.values.double())
    torch.testing.assert_close(layer.weight.double(), W, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.to_linear().weight.double(), W, rtol=1e-5, atol=1e-5)
    assert repr(layer).endswith(f"base={narrow})")

    other = Layer.beside(nn.Linear(40, 33, dtype=narrow), 3, 0.1, dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    sm.save_pretrained(nn.Sequential(layer), tmp_path)
    loaded = sm.load_pretrained(tmp_path, model=nn.Sequential(nn.Linear(40, 33)))[0]
    for twin in (other, copy.deepcopy(layer), loaded):
        assert torch.equal(twin(x), layer(x))
        assert twin.base.dtype == narrow
        assert not twin.base.requires_grad
    other.reset_parameters()
    torch.testing.assert_close(other(x), x @ linear.weight.float().T)


def test_a_base_that_does_not_go_with_the_layer() -> None:
    with pytest.raises(TypeError, match=r"base is torch\.float32, wanted torch\.float64 as U$"):
        Layer(4, 3, 1, 0.5, base=torch.ones(3, 4), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"base is \(4, 3\), wanted \(3, 4\)"):
        Layer(4, 3, 1, 0.5, base=torch.ones(4, 3))
    with pytest.raises(ValueError, match="init 'lost' splits a drawn matrix"):
        Layer(4, 3, 1, 0.5, base=torch.ones(3, 4), init="lost")
    with pytest.raises(ValueError, match="base is on meta, U on cpu"):
        Layer(4, 3, 1, 0.5, base=torch.ones(3, 4, device="meta"))
    with pytest.raises(TypeError, match="base must be a tensor, got list"):
        Layer(4, 3, 1, 0.5, base=[1.0])


def test_a_spoiled_support_is_not_loaded() -> None:
    layer = Layer(40, 33, 3, 0.2)
    state = layer.state_dict()
    state["columns"] = torch.full_like(state["columns"], 255)
    with pytest.raises(RuntimeError, match=r"family 'uniform': .* out of range"):
        layer.load_state_dict(state)


def test_initial_parameters() -> None:
    layer = Layer(400, 300, 20, 0.1)
    assert not layer.U.any()
    assert not layer.bias.any()
    for drawn in (layer.V, layer.values):
        assert drawn.abs().max() <= 1 / 20
        assert drawn.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    lost = Layer(60, 50, 5, 0.1, family="columns", init="lost", dtype=torch.float64)
    torch.testing.assert_close(lost.U.T @ lost.U, (lost.U.T @ lost.U).diag().diag())
    assert lost.pattern.nnz == 6 * 50
    with pytest.raises(ValueError, match="init is 'zero'"):
        Layer(4, 4, 1, 0.5, init="zero")
    with pytest.raises(ValueError, match="rank must be from 0 to 4"):
        Layer(4, 5, 5, 0.5)
    with pytest.raises(ValueError, match="density is 2"):
        Layer(4, 5, 1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_linear(family: str) -> None:
    linear = nn.Linear(40, 33).eval()
    layer = Layer.from_linear(linear, 4, 0.2, family=family)
    W = linear.weight.detach().double()
    U, S, Vh = torch.linalg.svd(W)
    residual = W - U[:, :4] @ S[:4].diag() @ Vh[:4]
    pattern = sm.SparsePattern.from_scores(residual.square(), 0.2, family=family)
    want = (residual * ~pattern.to_mask()).norm()
    assert (W - layer.weight.double()).norm() < 0.99 * want  # what one step leaves
    assert not layer.training
    assert torch.equal(layer.bias, linear.bias)
    back = layer.to_linear()
    torch.testing.assert_close(back.weight, layer.weight + 0)
    whole = Layer.from_linear(linear, 4, 1.0, family=family)
    torch.testing.assert_close(whole.to_linear().weight, linear.weight, rtol=0, atol=1e-6)
    nn.init.constant_(linear.weight, torch.nan)
    with pytest.raises(ValueError, match="NaN or Inf"):
        Layer.from_linear(linear, 1, 0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_reselection_carries_values_and_moments(family: str) -> None:
    layer = Layer(40, 33, 3, 0.5, family=family)
    optimizer = torch.optim.Adam(layer.parameters(), amsgrad=True)
    x = torch.randn(9, 40)
    layer(x).square().sum().backward()
    optimizer.step()
    values, state = layer.values, optimizer.state[layer.values]

    def dense() -> list[torch.Tensor]:
        held = [values.detach(), state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"]]
        return [layer.pattern.scatter(a) for a in held]

    before, old = dense(), layer.pattern.to_mask()
    scores = torch.rand(33, 40) + 0.05 * old
    moved = layer.reselect(scores)
    moved.carry_optimizer_state(optimizer)
    new = layer.pattern.to_mask()
    assert layer.pattern == sm.SparsePattern.from_scores(scores, 0.5, family=family)
    assert layer.values is values
    assert values.grad is None
    assert 0 < len(moved.new) < len(values)
    for a, b in zip(dense(), before, strict=True):
        assert torch.equal(a, b * new)
    assert state["step"] == 1
    layer(x.requires_grad_()).square().sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"scores is \(40, 33\)"):
        layer.reselect(scores.T)
    with pytest.raises(ValueError, match="does not hold the values"):
        moved.carry_optimizer_state(torch.optim.SGD([layer.U], 0.1))
    with pytest.raises(RuntimeError, match="was carried before"):
        moved.carry_optimizer_state(optimizer)


def test_compile_and_export() -> None:
    torch.compiler.reset()
    layer, x = Layer(20, 18, 2, 0.3), torch.randn(4, 20)
    leaves = list(layer.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(layer(x).square().sum(), leaves)
    for a, b in zip(torch.autograd.grad(compiled(x).square().sum(), leaves), want, strict=True):
        assert torch.equal(a, b)
    layer.reselect(torch.rand(18, 20))
    layer.columns = layer.columns.clone()  # as if moved
    t = x.clone().requires_grad_()
    want = torch.autograd.grad(layer(t).sum(), t)
    layer.columns = layer.columns.clone()
    assert torch.equal(torch.autograd.grad(compiled(t).sum(), t)[0], want[0])
    torch.testing.assert_close(compiled(x), layer(x))
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_training_lowers_the_loss() -> None:
    layer, x = Layer(20, 18, 2, 0.3, family="vector16"), torch.randn(64, 20)
    y = x @ torch.randn(20, 18) / 4
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (layer(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_support_survives_the_meta_device() -> None:
    layer = Layer(40, 33, 3, 0.2, seed=4)
    pattern, x = layer.pattern, torch.randn(2, 40)
    for empty in (layer.to("meta"), layer):
        empty.to_empty(device="cpu")
        empty.reset_parameters()
        assert empty.pattern == pattern
        assert empty.pattern.seed == 4
        assert empty(x).isfinite().all()
    layer.reselect(torch.rand(33, 40))  # has no seed
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cpu").reset_parameters()
    with pytest.raises(RuntimeError, match="the support was lost"):
        layer(x)
    assert "nnz=264" in repr(layer)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


def test_a_written_index_is_taken() -> None:
    layer, other = Layer(40, 33, 3, 0.2, seed=4), Layer(40, 33, 3, 0.2, seed=5)
    x = torch.randn(2, 40, requires_grad=True)
    layer(x).sum().backward()
    for name, index in other.named_buffers():
        layer.get_buffer(name).copy_(index)
    dx = torch.autograd.grad(layer(x).sum(), x)[0]
    torch.testing.assert_close(dx, (layer.weight + 0).sum(0).expand(2, 40), rtol=1e-4, atol=1e-5)
    assert layer.pattern == other.pattern
    assert layer.pattern.seed is None
    assert sm.SparsePattern.from_state_dict(layer.pattern.state_dict()) == other.pattern
    taken = layer.pattern
    layer.columns.copy_(other.columns)  # changes nothing
    assert layer.pattern is taken
    layer.columns.fill_(255)
    with pytest.raises(ValueError, match="out of range"):
        layer(x)
    layer.columns, layer.starts = other.columns[:-2], other.starts
    with pytest.raises(ValueError, match="starts must ascend"):
        layer(x)


def test_copies_keep_seed_and_support() -> None:
    layer = Layer(40, 33, 3, 0.2, seed=4)
    assert copy.deepcopy(layer).pattern.seed == 4
    assert layer.double().pattern.seed == 4
    layer.load_state_dict(Layer(40, 33, 3, 0.2, seed=5).double().state_dict())
    assert layer.pattern.seed is None


def test_values_and_support_load_together() -> None:
    layer, other = nn.Sequential(Layer(40, 33, 3, 0.2)), nn.Sequential(Layer(40, 33, 3, 0.1))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = other.state_dict()
    lacking = {name: a for name, a in state.items() if name not in ("0.starts", "0.columns")}
    spoiled = state | {"0.values": state["0.values"][:-1]}
    for given, message in ((lacking, "0.starts, 0.columns missing"), (spoiled, "family 'uniform'")):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(given, strict=False)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name])
    x = torch.randn(5, 40)
    layer(x).sum().backward()
    layer.load_state_dict(state)
    assert layer[0].values.grad is None
    assert torch.equal(layer(x), other(x))
    layer[0].reselect(torch.rand(33, 40))
    assert layer[0].pattern.nnz == other[0].pattern.nnz


def test_layers_differ_unless_torch_is_seeded() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        a, b = Layer(40, 33, 3, 0.2), Layer(40, 33, 3, 0.2)
        torch.manual_seed(3)
        c = Layer(40, 33, 3, 0.2)
    assert a.pattern != b.pattern
    assert a.pattern == c.pattern
