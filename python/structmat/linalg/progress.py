# SPDX-License-Identifier: Apache-2.0
"""A progress bar on standard error for what takes more than a second, on a terminal."""

import sys
import time
from typing import Any

from torch import Tensor

_PATIENCE = 1.0  # seconds


class Bar:
    def __init__(self, text: str, shown: bool) -> None:
        self.text = text
        self.total: int | None = None  # bytes of a sweep
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self._begin = time.perf_counter()
        self._done = 0
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def restart(self, text: str) -> None:
        """A new sweep; one knows how long it is once the first is over."""
        if self.total is None and self._done:
            self.total = self._done
        self.text, self._done = text, 0
        self._update()

    def advance(self, block: Tensor) -> None:
        values = block.values() if block.is_sparse_csr else block
        self._done += values.numel() * values.element_size()
        self._update()

    def _update(self) -> None:
        if not self._shown or time.perf_counter() - self._begin < _PATIENCE:
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.text, total=self.total)
        self._progress.update(
            self._task, description=self.text, completed=self._done, total=self.total
        )
