# SPDX-License-Identifier: Apache-2.0
"""A folder written whole or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def entries(folder: Path) -> list[str]:
    """Every file and folder in it, at any depth, by its path from there."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@contextmanager
def replacing(folder: Path, ours: Callable[[Path], list[str]]) -> Iterator[Path]:
    """A scratch folder that takes the place of ``folder`` on success and vanishes on failure.

    Only what ``ours(folder)`` names may be in the old one.

    Raises:
        ValueError: ``folder`` is a file, or something else is in it.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_pretrained: {folder} is a file")
    found = entries(folder) if folder.is_dir() else []
    foreign = sorted(set(found) - set(ours(folder))) if found else []
    if foreign:
        raise ValueError(
            f"save_pretrained: {folder} holds something else than a compressed model, "
            f"{foreign[0]!r}; choose an empty or new folder"
        )
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        new, old = work / "new", work / "old"
        try:
            new.mkdir()
            yield new
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:  # whatever stopped it: the old folder goes only once the new one is in its place
            if old.exists() and not folder.exists():
                old.rename(folder)
            shutil.rmtree(work, ignore_errors=True)
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty: it holds the new folder
                parent.rmdir()
