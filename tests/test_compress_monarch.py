# SPDX-License-Identifier: Apache-2.0
"""compress(method="monarch"): layers, errors, saving and loading, models of several structures."""

from pathlib import Path

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.compress.monarch import monarch_shape


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 64))


def batches() -> list[torch.Tensor]:
    return [torch.randn(60, 20) @ torch.randn(20, 64) for _ in range(3)]


def dense(layer: nn.Module) -> torch.Tensor:
    return sm.monarch.to_dense(layer.W1.detach().double(), layer.W2.detach().double())


@pytest.mark.parametrize(
    ("m", "n", "keep", "shape"),
    [
        (384, 384, 0.5, (2, 48)),
        (1536, 384, 0.5, (2, 76)),
        (384, 1536, 0.5, (2, 76)),
        (4096, 4096, 0.1, (2, 102)),
        (192, 320, 0.5, (2, 30)),  # 96 and 160: multiples of 32
        (192, 192, 0.5, (3, 16)),
        (45, 75, 0.5, (3, 4)),
        (64, 63, 0.5, None),  # no common divisor
        (4, 4, 0.3, None),  # not even two blocks of rank one
    ],
)
def test_shapes(m: int, n: int, keep: float, shape: tuple[int, int] | None) -> None:
    assert monarch_shape(m, n, keep) == shape
    if shape is not None:
        assert shape[0] * shape[1] * (m + n) <= keep * m * n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_data_weights_are_projected(dtype: torch.dtype) -> None:
    model, original = network().to(dtype), network().to(dtype)
    report = sm.compress(model, 0.5, method="monarch")
    assert report.kept <= 0.5
    for i in (0, 2, 3):
        layer, W = model[i], original[i].weight.detach()
        assert isinstance(layer, sm.nn.MonarchLinear)
        assert layer.W1.dtype == layer.W2.dtype == dtype
        best = sm.monarch.project(W, layer.n_blocks, layer.n_blocks, layer.rank)
        assert torch.equal(layer.W1, best.W1)
        assert torch.equal(layer.W2, best.W2)
        assert torch.equal(layer.bias, original[i].bias)
    entry = report.layers[0]
    assert (entry.kind, entry.n_blocks, entry.size) == ("monarch", 2, "2 x 9")
    assert entry.params_after == model[0].W1.numel() + model[0].W2.numel() == 18 * 160
    assert entry.measured_error is None
    assert 0 < entry.predicted_error < 1


def test_with_data_outputs_are() -> None:
    model, original, plain, data = network(), network(), network(), batches()
    report = sm.compress(model, 0.4, method="monarch", calibration=data)
    sm.compress(plain, 0.4, method="monarch")
    X = torch.cat(data).double()
    for i, entry in zip((0, 2, 3), report.layers, strict=True):
        W = original[i].weight.detach().double()
        error, without = (
            float((X @ (W - dense(m[i])).T).norm() / (X @ W.T).norm()) for m in (model, plain)
        )
        assert entry.predicted_error == pytest.approx(error, rel=1e-4)
        assert entry.measured_error == pytest.approx(error, rel=1e-3)
        assert error < 0.9 * without
        with torch.no_grad():
            X = original[i](X.float()).double()
            X = original[1](X.float()).double() if i == 0 else X


def test_saved_and_loaded_beside_other_structures(tmp_path: Path) -> None:
    model, data = network(), batches()
    sm.compress(model, 0.5, method="monarch", calibration=data, filter="0")
    sm.compress(model, 0.5, method="whitened", calibration=data, filter="2")
    kinds = [type(model[i]) for i in (0, 2, 3)]
    assert kinds == [sm.nn.MonarchLinear, sm.nn.LowRankLinear, nn.Linear]
    sm.save_pretrained(model, tmp_path / "out")
    loaded = sm.load_pretrained(tmp_path / "out", model=network())
    assert isinstance(loaded[0], sm.nn.MonarchLinear)
    with torch.no_grad():
        assert torch.equal(loaded(data[0]), model(data[0]))
    again = sm.load_pretrained(tmp_path / "out", model=loaded)  # into a model that has the layers
    assert torch.equal(again[0].W1, model[0].W1)
    assert "2 x 9" in str(sm.compress(network(), 0.5, method="monarch"))
    with pytest.raises(ValueError, match=r"Monarch layers have no leading part.*keep=0\.5"):
        sm.load_pretrained(tmp_path / "out", keep=0.3, model=network())


def test_block_diagonal_layers_are_saved_too(tmp_path: Path) -> None:
    model = network()
    model[2] = sm.nn.BlockDiagonalLinear(96, 64, 5)  # padded
    sm.compress(model, 0.5, method="svd", filter="3")
    sm.save_pretrained(model, tmp_path / "out")
    x = torch.randn(3, 64)
    for into in (network(), model):
        loaded = sm.load_pretrained(tmp_path / "out", model=into)
        assert repr(loaded[2]) == repr(model[2])
        with torch.no_grad():
            assert torch.equal(loaded(x), model(x))
    with pytest.raises(ValueError, match="the model is a linear layer itself"):
        sm.compress(sm.nn.BlockDiagonalLinear(8, 8, 2), method="svd")


def test_tied_layers_stay_tied() -> None:
    model = network()
    model[3].weight = nn.Parameter(model[3].weight.detach().clone())
    model.append(nn.Linear(64, 64))
    model[4].weight = model[3].weight
    sm.compress(model, 0.5, method="monarch", filter=["3", "4"])
    assert model[3].W1 is model[4].W1
    assert model[3].W2 is model[4].W2
    assert model[3].bias is not model[4].bias


def test_refuses() -> None:
    with pytest.raises(ValueError, match="method='monarch' has ranks='uniform' only"):
        sm.compress(network(), method="monarch", ranks="global", calibration=batches())
    with pytest.raises(ValueError, match="sequential goes with method='whitened'"):
        sm.compress(network(), method="monarch", sequential=True, calibration=batches())
    with pytest.raises(ValueError, match=r"LowRankLinear or MonarchLinear"):
        sm.compress(sm.nn.MonarchLinear(8, 8), method="monarch")
