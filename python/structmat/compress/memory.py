# SPDX-License-Identifier: Apache-2.0
"""The most memory held during a piece of work, beyond what was held at its start."""

from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """``.bytes``: of the CUDA allocator, else of this process (Linux); ``None`` where unknown."""

    def __init__(self, device: torch.device):
        self._device = device
        self._start: int | None = None
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
            except OSError:
                return self
            self._start = _status("VmRSS")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            peak = _status("VmHWM")
        if peak is not None and self._start is not None:
            self.bytes = max(0, peak - self._start)


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None
