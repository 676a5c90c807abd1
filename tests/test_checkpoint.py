# SPDX-License-Identifier: Apache-2.0
"""Compressed models on disk: the same model back, smaller ones, and nothing half-written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from test_compress import LAYER, batches, bert, gpt2  # noqa: E402

import structmat as sm  # noqa: E402
from structmat.compress.report import attached  # noqa: E402


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**batches(1)[0])[0]


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("ranks", ["uniform", "global"])
def test_same_model_back(tmp_path: Path, make: Any, ranks: str) -> None:
    model = make()
    report = sm.compress(model, 0.5, ranks=ranks, calibration=batches())
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out")
    assert type(back) is type(model)
    assert not back.training
    assert torch.equal(outputs(back), outputs(model))
    assert attached(back) == report
    if make is gpt2:
        assert back.lm_head.weight is back.transformer.wte.weight
        names = safetensors.load_file(tmp_path / "out" / "structmat.safetensors")
        assert ("lm_head.weight" in names) != ("transformer.wte.weight" in names)


def test_description(tmp_path: Path) -> None:
    model = bert().to(torch.bfloat16)
    report = sm.compress(model, 0.5, calibration=batches(), filter="encoder.*")
    sm.save_pretrained(model, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "structmat.json").read_text())
    layer = next(x for x in described["layers"] if x["places"] == [LAYER])
    entry = next(x for x in report.layers if x.name == LAYER)
    assert layer == {
        "places": [LAYER],
        "kind": "low_rank",
        "m": 48,
        "n": 48,
        "rank": entry.rank,
        "bias": True,
        "dtype": "bfloat16",
        "predicted_error": entry.predicted_error,
        "calibration_hash": report.calibration_hash,
    }
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").hidden_size == 48
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_smaller_keep_equals_direct_compression(tmp_path: Path, method: str) -> None:
    model = bert()
    sm.compress(model, 0.7, method=method, calibration=batches())
    sm.save_pretrained(model, tmp_path / "out")
    small = sm.load_pretrained(tmp_path / "out", keep=0.4)
    direct = bert()
    report = sm.compress(direct, 0.4, method=method, calibration=batches())
    for (name, x), y in zip(small.state_dict().items(), direct.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, msg=name)
    torch.testing.assert_close(outputs(small), outputs(direct), rtol=1e-6, atol=1e-5)
    loaded = attached(small)
    assert loaded is not None
    assert loaded.kept == report.kept
    for a, b in zip(loaded.layers, report.layers, strict=True):
        assert a.rank == b.rank
        assert a.predicted_error == pytest.approx(b.predicted_error, rel=1e-9)


def test_smaller_keep_with_global_ranks(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.6, ranks="global", calibration=batches(), filter="encoder.*")
    sm.save_pretrained(model, tmp_path / "out")
    small = sm.load_pretrained(tmp_path / "out", keep=0.4)
    report = attached(small)
    assert report is not None
    assert 0.35 < report.kept <= 0.4
    for layer in report.layers:
        if layer.rank:
            assert small.get_submodule(layer.name).rank == layer.rank
            assert layer.predicted_error == layer.errors[layer.rank]


def test_dtype_and_device(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(back).float(), outputs(model), rtol=0.1, atol=0.2)


def test_any_module_and_tied_layers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24))
        model[2].weight = model[0].weight
        model.register_buffer("scale", torch.ones(3))
        return model

    model = build()
    sm.compress(model, 0.5, method="svd")
    sm.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match="give model"):
        sm.load_pretrained(tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", model=build())
    x = torch.randn(3, 24)
    assert torch.equal(back(x), model(x))
    assert back[0].U is back[2].U
    again = sm.load_pretrained(tmp_path / "out", keep=0.3, model=back)
    assert again[0].rank == 3
    with pytest.raises(ValueError, match="no layer 0"):
        sm.load_pretrained(tmp_path / "out", model=nn.ModuleDict({"a": nn.Linear(24, 24)}))


def test_a_layer_made_by_hand(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model[0] = sm.nn.LowRankLinear.from_linear(model[0], 3)
    sm.save_pretrained(model, tmp_path / "out")
    back = sm.load_pretrained(tmp_path / "out", model=nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(2, 8)
    assert torch.equal(back(x), model(x))
    with pytest.raises(ValueError, match="no report"):
        sm.load_pretrained(tmp_path / "out", keep=0.2, model=nn.Sequential(nn.Linear(8, 8)))


class Tokenizer:
    def __init__(self, fail: bool = False) -> None:
        self.fail = fail

    def save_pretrained(self, folder: Path) -> None:
        if self.fail:
            raise OSError("disk full")
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.5, method="svd")
    with pytest.raises(OSError, match="disk full"):
        sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer(fail=True))
    assert list(tmp_path.iterdir()) == []
    sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer())
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert "tokenizer.json" in before
    with pytest.raises(OSError, match="disk full"):
        sm.save_pretrained(model, tmp_path / "out", tokenizer=Tokenizer(fail=True))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    sm.save_pretrained(model, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_bad_folders(tmp_path: Path) -> None:
    model = bert()
    sm.compress(model, 0.5, method="svd")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        sm.save_pretrained(model, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("")
    with pytest.raises(ValueError, match="holds something else"):
        sm.save_pretrained(model, tmp_path / "other")
    with pytest.raises(ValueError, match=r"no structmat\.json"):
        sm.load_pretrained(tmp_path / "other")
    sm.save_pretrained(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"was compressed to keep=0\.5, got 0\.8"):
        sm.load_pretrained(tmp_path / "out", keep=0.8)
    with pytest.raises(ValueError, match="keep must lie between"):
        sm.load_pretrained(tmp_path / "out", keep=0)
    description = json.loads((tmp_path / "out" / "structmat.json").read_text())
    description["format"] = 99
    (tmp_path / "out" / "structmat.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="format 99"):
        sm.load_pretrained(tmp_path / "out")
