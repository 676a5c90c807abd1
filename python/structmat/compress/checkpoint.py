# SPDX-License-Identifier: Apache-2.0
"""Compressed models on disk: safetensors, a JSON description, config and tokenizer."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..nn import BlockDiagonalLinear, LowRankLinear, MonarchLinear, SparseLowRankLinear
from .folder import entries, replacing
from .layers import STRUCTURED, bias_of, is_linear, replace, weight_of
from .report import CompressionReport, LayerReport, attach, attached
from .shrink import shrink

FORMAT = 1
TENSORS = "structmat.safetensors"
DESCRIPTION = "structmat.json"


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None
) -> None:
    """Writes a model whose layers :func:`structmat.compress` replaced.

    ``structmat.safetensors`` holds every tensor of the state, shared ones once, factors in
    descending energy; ``structmat.json`` the class of the model, per new layer its shapes,
    rank, number of blocks or density and family, dtype, predicted error and the hash of the
    calibration data, the reports of all compressions, and the names of the files written;
    ``config.json`` (and ``generation_config.json``) come from transformers.

    Everything is written into a folder beside the wanted one, which is then renamed: on failure
    nothing is left, and what was there before is untouched.

    Args:
        model: any module; a transformers model can be loaded without naming its class again.
        folder: made where it is missing; an earlier save in it is replaced, a link to a folder
            followed.
        tokenizer: anything else with ``save_pretrained``, stored along with the model.

    Raises:
        ValueError: ``folder`` is a file, or a folder with anything but an earlier save in it; a
            parameter is on the meta device.
        OSError: the folder cannot be written.

    Example:
        >>> import torch, structmat as sm
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = sm.compress(model, keep=0.5, method="svd")
        >>> sm.save_pretrained(model, "compressed")
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    tensors, shared = _unshared(model.state_dict())
    with replacing(folder, _files) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        for part in ("config", "generation_config"):
            holder: Any = getattr(model, part, None)
            if hasattr(holder, "save_pretrained"):
                holder.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        description = _describe(model, shared)
        description["files"] = sorted({DESCRIPTION, *entries(scratch)})
        (scratch / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")


def load_pretrained(
    folder: str | os.PathLike[str],
    keep: float | None = None,
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Loads what :func:`save_pretrained` wrote, in evaluation mode.

    Args:
        folder: the saved folder.
        keep: a smaller kept fraction than the file's: the leading part of every pair of factors.
            With uniform ranks and no ``sequential`` the result equals compressing to it
            directly; with global ranks the budget is divided anew by the stored losses,
            layers stored dense staying so. Of a model compressed in several steps, each is
            cut that kept more; Monarch layers cannot be.
        model: the uncompressed architecture to load into, needed unless it is a class of
            transformers that its config alone builds. Its weights do not matter; it is changed in
            place, and only once all is known to fit.
        device: where the model goes, the CPU by default.
        dtype: of the parameters, as stored by default.

    Raises:
        ValueError: not such a folder; of a newer format; damaged; ``keep`` is larger than what the
            file holds, or smaller than its Monarch layers kept, or smaller than layers
            stored dense and rank one elsewhere need; the model's layers, or names or shapes
            of its other tensors, are not the file's.

    Example:
        >>> import torch, structmat as sm
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> model = build()
        >>> _ = sm.compress(model, keep=0.5, method="svd")
        >>> sm.save_pretrained(model, "compressed")
        >>> sm.load_pretrained("compressed", keep=0.25, model=build())[0]
        LowRankLinear(in_features=64, out_features=64, rank=8, bias=True)
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    stored = _read(folder)
    try:
        state = load_file(folder / TENSORS, device=str(device or "cpu"))
    except SafetensorError as error:
        raise ValueError(f"load_pretrained: {folder / TENSORS} is damaged: {error}") from error
    layers, reports = stored.layers, stored.reports
    if keep is not None:
        reports = shrink(layers, reports, state, keep)
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    for name, kept in stored.shared.items():
        if kept not in state:
            raise ValueError(f"load_pretrained: {folder / TENSORS} is damaged: no {kept}")
        state[name] = state[kept]
    model = _build(folder, stored.model_class) if model is None else model
    _check(model, layers, state)
    swaps = {place: _layer(layer) for layer in layers for place in layer["places"]}
    replace(model, swaps)
    model.load_state_dict(state, assign=True)
    for name, kept in stored.shared.items():
        _tie(model, name, kept)
    for report in reports:
        attach(model, report)
    return model.to(device or "cpu").eval()


def _layer(stored: dict[str, Any]) -> nn.Module:
    """A layer of the shape stored, without numbers."""
    m, n, rank, blocks, bias = (stored[key] for key in ("m", "n", "rank", "n_blocks", "bias"))
    if stored["density"] is not None:
        density, family = stored["density"], stored["family"]
        base = torch.empty(m, n, device="meta") if stored["base"] else None
        like: dict[str, Any] = {"family": family, "bias": bias, "base": base, "device": "meta"}
        return SparseLowRankLinear(n, m, rank, density, **like)
    if blocks is None:
        return LowRankLinear(n, m, rank, bias, device="meta")
    if rank is None:
        return BlockDiagonalLinear(n, m, blocks, bias, device="meta")
    return MonarchLinear(n, m, blocks, bias, rank=rank, device="meta")


class _Stored(NamedTuple):
    model_class: str
    layers: list[dict[str, Any]]
    shared: dict[str, str]
    reports: list[CompressionReport]


def _describe(model: nn.Module, shared: dict[str, str]) -> dict[str, Any]:
    reports = attached(model)
    known = {layer.name: (layer, report) for report in reports for layer in report.layers}
    first_names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, STRUCTURED):
            first_names.setdefault(id(next(module.parameters())), []).append(name)
    layers = []
    for places in first_names.values():
        module = model.get_submodule(places[0])
        assert isinstance(module, STRUCTURED)
        layer, report = next((known[name] for name in places if name in known), (None, None))
        layers.append(
            {
                "places": places,
                "m": module.out_features,
                "n": module.in_features,
                "rank": getattr(module, "rank", None),
                "n_blocks": getattr(module, "n_blocks", None),
                "density": getattr(module, "density", None),
                "family": getattr(module, "family", None),
                "bias": module.bias is not None,
                "base": getattr(module, "base", None) is not None,
                "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
                "predicted_error": layer.predicted_error if layer else None,
                "calibration_hash": report.calibration_hash if report else None,
            }
        )
    return {
        "format": FORMAT,
        "class": type(model).__name__,
        "layers": layers,
        "shared": shared,
        "reports": [report.to_dict() for report in reports],
    }


def _files(folder: Path) -> list[str]:
    """What an earlier save wrote there."""
    try:
        return list(json.loads((folder / DESCRIPTION).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _read(folder: Path) -> _Stored:
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"load_pretrained: no {DESCRIPTION} and {TENSORS} in {folder}")
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise ValueError(
                f"it has format {stored['format']}, this version of structmat reads {FORMAT}"
            )
        keys = ("places", "m", "n", "rank", "bias")
        return _Stored(
            model_class=str(stored["class"]),
            layers=[
                {key: layer[key] for key in keys}
                | {key: layer.get(key) for key in ("n_blocks", "density", "family", "base")}
                for layer in stored["layers"]
            ],
            shared=dict(stored["shared"]),
            reports=[
                CompressionReport(**{**x, "layers": [LayerReport(**y) for y in x["layers"]]})
                for x in stored["reports"]
            ],
        )
    except KeyError as error:
        raise ValueError(f"load_pretrained: {path} has no {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_pretrained: cannot read {path}: {error}") from error


def _build(folder: Path, name: str) -> nn.Module:
    import transformers

    kind: Any = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or not (folder / "config.json").is_file():
        raise ValueError(
            f"load_pretrained: {name} is not a model of transformers {transformers.__version__}; "
            "give model, the uncompressed architecture"
        )
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    home = "initialization" if transformers.__version__ >= "5" else "modeling_utils"
    with import_module(f"transformers.{home}").no_init_weights():  # all are about to be replaced
        model: Any = kind(config)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        model.generation_config = transformers.GenerationConfig.from_pretrained(
            folder, local_files_only=True
        )
    return cast(nn.Module, model)


def _check(model: nn.Module, layers: list[dict[str, Any]], state: dict[str, Tensor]) -> None:
    """That the layers, names and shapes stored are the model's, which is left as it is.

    Raises:
        ValueError: they are not.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in layers:
        m, n = layer["m"], layer["n"]
        parts = _layer(layer).state_dict()
        for place in layer["places"]:
            try:
                old = model.get_submodule(place)
            except AttributeError as error:
                raise ValueError(f"load_pretrained: the model has no layer {place}") from error
            if isinstance(old, STRUCTURED):
                found = (old.out_features, old.in_features)
            elif is_linear(old):
                a, b = weight_of(old).shape
                found = (a, b) if isinstance(old, nn.Linear) else (b, a)
            else:
                raise ValueError(
                    f"load_pretrained: {place} is a {type(old).__name__}, not a linear layer"
                )
            if found != (m, n) or (bias_of(old) is not None) != layer["bias"]:
                raise ValueError(
                    f"load_pretrained: the model's {place} is {found[0]} x {found[1]} "
                    f"{'with' if bias_of(old) is not None else 'without'} bias, the stored one "
                    f"{m} x {n} {'with' if layer['bias'] else 'without'}"
                )
            for part in old.state_dict():
                wanted.pop(f"{place}.{part}", None)
            wanted |= {f"{place}.{part}": tuple(x.shape) for part, x in parts.items()}
    stored = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in [*wanted, *stored]:
        if wanted.get(name) != stored.get(name):
            raise ValueError(
                f"load_pretrained: {name} is {stored.get(name, 'missing')} in the folder and "
                f"{wanted.get(name, 'missing')} in the model; give the model that was compressed, "
                "as it was before, as model"
            )


def _tie(model: nn.Module, name: str, kept: str) -> None:
    parent, _, leaf = name.rpartition(".")
    source, _, source_leaf = kept.rpartition(".")
    setattr(model.get_submodule(parent), leaf, getattr(model.get_submodule(source), source_leaf))


def _unshared(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state, each once and contiguous, and the names that mean another one's."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"save_pretrained: {name} is on the meta device, it has no data")
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        storage = tensor.untyped_storage().data_ptr()
        tensor = tensor.detach().contiguous()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return tensors, shared
