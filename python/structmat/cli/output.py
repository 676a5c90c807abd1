# SPDX-License-Identifier: Apache-2.0
"""Where results go: files that appear whole or not at all, JSON, progress bars."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from structmat.cli.errors import UserError
from structmat.compress.folder import replacing


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` to write into; renamed to it if all goes well, else removed.

    Raises:
        UserError: ``target`` exists.
        OSError: nothing can be written there. Raised before the work begins.
    """
    _refuse_existing(target)
    with replacing(target, lambda _: []) as beside:
        yield beside
        _refuse_existing(target)  # made meanwhile by somebody else


@contextmanager
def new_file(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """As :func:`new_folder`, for one file. ``replace``: an older file gives way."""
    if not replace:
        _refuse_existing(target)
    missing = [parent for parent in target.parents if not parent.exists()]
    beside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        beside = Path(name)
        os.close(descriptor)
        yield beside
        beside.chmod(0o666 & ~_umask())  # mkstemp's is private to its owner
        if not replace:
            _refuse_existing(target)
        beside.rename(target)
    finally:
        if beside:
            beside.unlink(missing_ok=True)
        for parent in missing:
            with suppress(OSError):  # not empty: it holds the new file
                parent.rmdir()


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; remove it or choose another name")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def print_json(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(finite(result), indent=2, allow_nan=False))


def finite(value: Any) -> Any:
    """``value`` with NaN and infinities as ``None``: JSON has no word for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def progress(quiet: bool) -> Progress:
    """Progress bars on standard error, gone when done; none for programs and log files."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
