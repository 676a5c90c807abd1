# SPDX-License-Identifier: Apache-2.0
"""Compression, saving and loading on every back end; the numbers themselves: test_compress.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Backend
from torch import nn

pytest.importorskip("safetensors")

import structmat as sm


def build(device: str) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(40, 56), nn.GELU(), nn.Linear(56, 24)
    return nn.Sequential(*layers).to(device)


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize(
    "options",
    [{"method": "whitened"}, {"ranks": "global"}, {"sequential": True}],
    ids=["whitened", "global", "sequential"],
)
def test_compress_save_and_load(backend: Backend, tmp_path: Path, options: dict[str, Any]) -> None:
    device = backend.device
    model = build(device)
    mixing = torch.randn(40, 40)
    data = [(torch.randn(64, 40) @ mixing).to(device) for _ in range(3)]
    report = sm.compress(model, 0.6, calibration=data, **options)
    assert 0 < report.kept <= 0.6
    low = [layer for layer in report.layers if layer.rank]
    assert low
    for layer in low:
        assert layer.measured_error == pytest.approx(layer.predicted_error, rel=1e-3)
        assert {p.device.type for p in model.get_submodule(layer.name).parameters()} == {device}

    # The same layers in dense double-precision algebra.
    x = data[0]
    want = x.double().cpu()
    for module in model:
        if isinstance(module, nn.GELU):
            want = module(want)
        else:
            dense = module.to_linear() if isinstance(module, sm.nn.LowRankLinear) else module
            want = nn.functional.linear(
                want, *(p.detach().double().cpu() for p in dense.parameters())
            )
    got = output(model, x)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)

    sm.save_pretrained(model, tmp_path / "small")
    back = sm.load_pretrained(tmp_path / "small", model=build("cpu"), device=device)
    assert {p.device.type for p in back.parameters()} == {device}
    assert torch.equal(output(back, x), got)
    smaller = sm.load_pretrained(tmp_path / "small", model=build("cpu"), device=device, keep=0.4)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (smaller, back)]
    assert sizes[0] < sizes[1]
    assert output(smaller, x).isfinite().all()


def test_compress_agrees_with_the_cpu(backend: Backend) -> None:
    """The same seed and data: the same ranks, and the same weights up to rounding."""
    x = torch.randn(96, 40)
    models, ranks = [], []
    for device in ("cpu", backend.device):
        model = build(device)
        report = sm.compress(model, 0.5, calibration=[x.to(device)])
        ranks.append([layer.rank for layer in report.layers])
        models.append(model)
    assert ranks[0] == ranks[1]
    want, got = output(models[0], x), output(models[1], x.to(backend.device))
    torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-3)
