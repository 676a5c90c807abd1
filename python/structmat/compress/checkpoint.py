# SPDX-License-Identifier: Apache-2.0
"""Compressed models on disk: safetensors, a JSON description, config and tokenizer."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import LowRankLinear
from .allocate import global_ranks, parameters, uniform_rank
from .layers import is_linear, replace
from .report import CompressionReport, LayerReport, attach, attached

FORMAT = 1
TENSORS = "structmat.safetensors"
DESCRIPTION = "structmat.json"


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None
) -> None:
    """Writes a model whose layers :func:`structmat.compress` replaced.

    ``structmat.safetensors`` holds every tensor of the state, shared ones once, factors in
    descending energy; ``structmat.json`` the class of the model and, per layer, kind, shapes, rank,
    dtype, predicted error and the hash of the calibration data; ``config.json`` (and
    ``generation_config.json``) come from transformers.

    Everything is written into a folder beside the wanted one, which is then renamed: on failure
    nothing is left, and what was there before is untouched.

    Args:
        model: any module; a transformers model can be loaded without naming its class again.
        folder: made where it is missing; an earlier save in it is replaced.
        tokenizer: anything else with ``save_pretrained``, stored along with the model.

    Raises:
        ValueError: ``folder`` is a file, or a folder with something else in it; a parameter is on
            the meta device.
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
    with _replacing(folder) as scratch:
        save_file(tensors, scratch / TENSORS, metadata={"format": "pt"})
        description = _describe(model, shared)
        (scratch / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        for part in ("config", "generation_config"):
            holder: Any = getattr(model, part, None)
            if hasattr(holder, "save_pretrained"):
                holder.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)


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
            With uniform ranks and no ``sequential`` the result equals compressing to it directly;
            with global ranks the budget is divided anew by the stored losses, layers stored dense
            staying so.
        model: the uncompressed architecture to load into, needed unless it is a class of
            transformers. Its weights do not matter; it is changed in place.
        device: where the model goes, the CPU by default.
        dtype: of the parameters, as stored by default.

    Raises:
        ValueError: not such a folder; of a newer format; ``keep`` is larger than what the file
            holds; the model does not have the file's layers.

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
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"load_pretrained: no {DESCRIPTION} and {TENSORS} in {folder}")
    description = json.loads((folder / DESCRIPTION).read_text())
    if description.get("format") != FORMAT:
        raise ValueError(
            f"load_pretrained: {folder} has format {description.get('format')}, this version of "
            f"structmat reads format {FORMAT}"
        )
    state = load_file(folder / TENSORS, device=str(device or "cpu"))
    layers = description["layers"]
    report = _report(description)
    if keep is not None:
        report = _shrink(layers, report, state, keep, folder)
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    model = _build(folder, description["class"]) if model is None else model
    _swap(model, layers, state)
    for name, kept in description["shared"].items():
        state[name] = state[kept]
    wrong = model.load_state_dict(state, strict=False, assign=True)
    if wrong.missing_keys or wrong.unexpected_keys:
        raise ValueError(
            f"load_pretrained: {folder} does not fit the model: missing {wrong.missing_keys[:3]}, "
            f"unexpected {wrong.unexpected_keys[:3]}"
        )
    for name, kept in description["shared"].items():
        _tie(model, name, kept)
    if report is not None:
        attach(model, report)
    return model.to(device or "cpu").eval()


def _describe(model: nn.Module, shared: dict[str, str]) -> dict[str, Any]:
    report = attached(model)
    known = {layer.name: layer for layer in report.layers} if report else {}
    first_names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LowRankLinear):
            first_names.setdefault(id(module.U), []).append(name)
    layers = []
    for places in first_names.values():
        module = model.get_submodule(places[0])
        assert isinstance(module, LowRankLinear)
        layer = next((known[name] for name in places if name in known), None)
        layers.append(
            {
                "places": places,
                "kind": "low_rank",
                "m": module.out_features,
                "n": module.in_features,
                "rank": module.rank,
                "bias": module.bias is not None,
                "dtype": str(module.U.dtype).removeprefix("torch."),
                "predicted_error": layer.predicted_error if layer else None,
                "calibration_hash": report.calibration_hash if report and layer else None,
            }
        )
    return {
        "format": FORMAT,
        "class": type(model).__name__,
        "layers": layers,
        "shared": shared,
        "report": report.to_dict() if report else None,
    }


def _report(description: dict[str, Any]) -> CompressionReport | None:
    stored = description["report"]
    if stored is None:
        return None
    layers = [LayerReport(**layer) for layer in stored["layers"]]
    return CompressionReport(**{**stored, "layers": layers})


def _shrink(
    layers: list[dict[str, Any]],
    report: CompressionReport | None,
    state: dict[str, Tensor],
    keep: float,
    folder: Path,
) -> CompressionReport:
    """Cuts the factors in ``state`` to a smaller budget; ``layers`` gets the new ranks."""
    if not 0 < keep < 1:
        raise ValueError(f"load_pretrained: keep must lie between 0 and 1, got {keep!r}")
    if report is None:
        raise ValueError(
            f"load_pretrained: {folder} holds no report, so it can only be loaded whole"
        )
    if keep > report.keep:
        raise ValueError(
            f"load_pretrained: {folder} was compressed to keep={report.keep}, got {keep}"
        )
    ranks = _smaller_ranks(report, keep)
    for layer in layers:
        rank = next((ranks[name] for name in layer["places"] if name in ranks), layer["rank"])
        layer["rank"] = rank
        for place in layer["places"]:
            for name, size in (
                (f"{place}.U", (layer["m"], rank)),
                (f"{place}.V", (rank, layer["n"])),
            ):
                if name in state:
                    state[name] = state[name][: size[0], : size[1]].contiguous()
    smaller = []
    for old in report.layers:
        if old.name not in ranks:
            smaller.append(old)
            continue
        rank = ranks[old.name]
        smaller.append(
            changed(
                old,
                rank=rank,
                params_after=parameters(old.m, old.n, rank),
                predicted_error=old.errors[rank],
                measured_error=None,
                errors=old.errors[: rank + 1],
                loss=old.loss[: rank + 1],
            )
        )
    kept = sum(x.params_after for x in smaller) / sum(x.params_before for x in smaller)
    return changed(report, keep=keep, kept=kept, layers=smaller)


def _smaller_ranks(report: CompressionReport, keep: float) -> dict[str, int]:
    low = [layer for layer in report.layers if layer.rank is not None]
    busy = [layer for layer in low if layer.loss]
    ranks: dict[str, int] = {}
    for layer in low:
        rank = uniform_rank(layer.m, layer.n, keep)
        ranks[layer.name] = min(layer.rank or 1, rank or 1)
    if busy:
        shared = [x for x in report.layers if x.loss or x.rank is None]
        dense = sum(x.params_after for x in report.layers if x.rank is None)
        budget = int(keep * sum(x.params_before for x in shared)) - dense
        found = global_ranks(
            [(x.m, x.n) for x in busy], [x.loss for x in busy], budget, dense=False
        )
        ranks.update({x.name: rank or 1 for x, rank in zip(busy, found, strict=True)})
    return ranks


def _build(folder: Path, name: str) -> nn.Module:
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None or not (folder / "config.json").is_file():
        raise ValueError(
            f"load_pretrained: {name} is not a class of transformers {transformers.__version__}; "
            "give model, the uncompressed architecture"
        )
    return kind(transformers.AutoConfig.from_pretrained(folder, local_files_only=True))


def _swap(model: nn.Module, layers: list[dict[str, Any]], state: dict[str, Tensor]) -> None:
    swaps: dict[str, nn.Module] = {}
    for layer in layers:
        for place in layer["places"]:
            try:
                old = model.get_submodule(place)
            except AttributeError as error:
                raise ValueError(f"load_pretrained: the model has no layer {place}") from error
            if not is_linear(old) and not isinstance(old, LowRankLinear):
                raise ValueError(
                    f"load_pretrained: {place} is a {type(old).__name__}, not a linear layer"
                )
            swaps[place] = LowRankLinear(
                layer["n"], layer["m"], layer["rank"], bias=layer["bias"], device="meta"
            )
    replace(model, swaps)


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


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` on success and vanishes on failure."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DESCRIPTION).is_file():
        raise ValueError(
            f"save_pretrained: {folder} holds something else than a compressed model; choose an "
            "empty or new folder"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    old = scratch.with_name(scratch.name + ".old")
    try:
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o777 & ~mask)  # mkdtemp's is readable by its owner alone
        yield scratch
        if folder.exists():
            folder.rename(old)
        try:
            scratch.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
