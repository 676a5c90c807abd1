# SPDX-License-Identifier: Apache-2.0
"""``structmat compress``: a transformers model in, a smaller one out."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import structmat as sm
from structmat.cli.errors import UserError, reports_errors, require
from structmat.cli.output import new_folder, print_json, progress
from structmat.cli.text import batches_of, load_model, load_tokenizer, loss_for, read_passages
from structmat.compress.compress import STRUCTURES, WITHOUT_DATA


class Method(str, Enum):
    whitened = "whitened"
    svd = "svd"
    fisher = "fisher"
    monarch = "monarch"
    sparse_low_rank = "sparse_low_rank"


class Ranks(str, Enum):
    uniform = "uniform"
    global_ = "global"


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


@reports_errors
def compress(
    model: Annotated[str, typer.Argument(help="A transformers model: folder or name.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    keep: Annotated[float, typer.Option(help="Kept share of the replaced layers' parameters.")],
    method: Annotated[Method, typer.Option(help="What the factors preserve.")] = Method.whitened,
    ranks: Annotated[
        Ranks, typer.Option(help="The same share for each layer, or one budget over all.")
    ] = Ranks.uniform,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Fit each layer to compressed inputs (whitened).")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help='Text, one passage a line; or .jsonl with a "text" field.'),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Replace a model's linear layers by structured ones.

    The result loads with structmat.load_pretrained(OUT), at this size or, if of low rank, any
    smaller one.
    """
    require("transformers", "safetensors")
    if not 0 < keep < 1:
        raise UserError(f"--keep must lie between 0 and 1, got {keep:g}")
    without = method.value in WITHOUT_DATA
    if calibration is None and (not without or ranks is Ranks.global_ or sequential):
        raise UserError(
            f"needs --calibration FILE, except for --method {', '.join(WITHOUT_DATA)} with --ranks "
            "uniform"
        )
    if method.value in STRUCTURES and ranks is Ranks.global_:
        raise UserError(f"--method {method.value} goes with --ranks uniform")
    if sequential and method is not Method.whitened:
        raise UserError(f"--sequential goes with --method whitened, not {method.value}")
    if device is Device.cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    passages = read_passages(calibration) if calibration else []
    with new_folder(out) as folder, progress(as_json) as bar:
        task = bar.add_task("load", total=None, note="")
        network = load_model(model, torch.device(device.value))
        tokenizer, batches, objective = None, None, None
        if passages:
            tokenizer = load_tokenizer(model)
            batches = batches_of(passages, tokenizer, network.config)
            if method is Method.fisher:
                batches, objective = loss_for(network, batches)
        report = sm.compress(
            network,
            keep,
            method=method.value,
            ranks=ranks.value,
            sequential=sequential,
            calibration=batches,
            objective=objective,
            seed=seed,
            progress=lambda stage, done, total: bar.update(
                task, description=stage, completed=done, total=total, note=f"{done} of {total}"
            ),
        )
        bar.update(task, description="save", total=None, note="")
        sm.save_pretrained(network, folder, tokenizer=tokenizer or _tokenizer_if_any(model))
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if as_json:
        print_json({**_facts(report), "model": model, "output": str(out), "bytes": size})
    else:
        _print(report, out, size)


def _tokenizer_if_any(model: str) -> Any:
    try:
        return load_tokenizer(model)
    except UserError:
        return None


def _facts(report: Any) -> dict[str, Any]:
    """The report without the curves of every layer, which OUT/structmat.json holds."""
    facts: dict[str, Any] = report.to_dict()
    for layer in facts["layers"]:
        for curve in ("spectrum", "errors", "loss"):
            layer.pop(curve, None)
    return facts


def _print(report: Any, out: Path, size: int) -> None:
    console = Console()
    table = Table(header_style="bold")
    table.add_column("layer", overflow="fold")
    for name in ("shape", "rank", "parameters", "kept", "predicted error", "measured error"):
        table.add_column(name, justify="right")
    for layer in report.layers:
        table.add_row(
            layer.name,
            f"{layer.m} x {layer.n}",
            layer.size,
            f"{layer.params_after:,}",
            f"{layer.params_after / layer.params_before:.3f}",
            _number(layer.predicted_error),
            _number(layer.measured_error),
        )
    console.print(table)
    before = sum(layer.params_before for layer in report.layers)
    after = sum(layer.params_after for layer in report.layers)
    memory = "" if report.peak_memory is None else f", {report.peak_memory / 1e6:,.0f} MB of memory"
    console.print(
        f"{len(report.layers)} layers, {before:,} -> {after:,} parameters "
        f"({report.kept:.1%} kept); {report.seconds:.1f} s{memory}.",
        highlight=False,
    )
    console.print(
        f"Written to {out} ({size / 1e6:,.1f} MB). "
        f"Load it with structmat.load_pretrained({str(out)!r}).",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
