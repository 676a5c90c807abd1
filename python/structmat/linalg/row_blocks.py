# SPDX-License-Identifier: Apache-2.0
"""Matrices that are read a block of rows at a time: files, and callables that give iterators."""

import json
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

_OP = "svd_out_of_core"
_BLOCK_BYTES = 16 << 20
_QUEUE = 2  # blocks read ahead
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
Blocks = str | os.PathLike[str] | Callable[[], Iterable[Any]]


class Source:
    """``blocks()`` starts a sweep. ``transposed``: what comes are rows of ``A^T``."""

    transposed = False
    shape: tuple[int, int] | None = None  # of what comes
    bytes: int | None = None  # of a sweep

    def __init__(self, factory: Callable[[], Iterable[Any]]) -> None:
        self._factory = factory

    def blocks(self) -> Iterator[Tensor]:
        found = self._factory()
        try:
            iterator = iter(found)
        except TypeError:
            raise TypeError(
                f"{_OP}: blocks() returned {type(found).__name__}, wanted an iterator of row blocks"
            ) from None
        for block in iterator:
            yield _tensor(block)


class MatrixFile(Source):
    """A matrix in a .npy or .safetensors file, read with ``readinto``: pages of a memory map would
    count as resident, and cost a fault each."""

    def __init__(self, path: str, block_rows: int | None) -> None:
        name = ""
        if not os.path.exists(path) and "::" in path:
            path, name = path.rsplit("::", 1)
        self.path = path
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{_OP}: there is no file {path}")
        if path.endswith(".npy"):
            if name:
                raise ValueError(f"{_OP}: {path} holds one array, wanted no name, got {name!r}")
            self._open_npy()
        elif path.endswith(".safetensors"):
            self._open_safetensors(name)
        else:
            raise ValueError(f"{_OP}: {path} is of no known kind, wanted .npy or .safetensors")
        m, n = self.shape = self._shape
        self.bytes = m * n * self._dtype.itemsize
        if 0 in (m, n):
            raise ValueError(f"{_OP}: {path} is empty, shape {(m, n)}")
        row = n * self._dtype.itemsize
        if os.path.getsize(path) < self._offset + self.bytes:
            raise ValueError(f"{_OP}: {path} ends before its matrix of shape {(m, n)} does")
        self._rows = min(block_rows or max(1, _BLOCK_BYTES // row), m)

    def _open_npy(self) -> None:
        try:
            # reads the header only; versions and Fortran order are NumPy's business
            array = np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{_OP}: {self.path} is no .npy file of numbers: {error}") from None
        if array.ndim != 2:
            raise ValueError(f"{_OP}: {self.path} holds shape {array.shape}, wanted a matrix")
        native = array.dtype.newbyteorder("=")
        if native.name not in ("float64", "float32", "float16"):
            raise TypeError(
                f"{_OP}: {self.path} holds {array.dtype}, wanted float64, float32 or float16"
            )
        self.transposed = array.flags.f_contiguous and not array.flags.c_contiguous
        self._offset = array.offset
        self._swapped = array.dtype.byteorder not in ("=", "|", native.byteorder) and (
            array.dtype != native
        )
        self._dtype = torch.from_numpy(np.empty(0, native)).dtype
        self._shape = array.shape[::-1] if self.transposed else array.shape

    def _open_safetensors(self, name: str) -> None:
        wanted = ", ".join(_SAFETENSORS)
        try:
            with open(self.path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length < os.path.getsize(self.path):
                    raise ValueError("its header is cut off")
                header = json.loads(file.read(length))
            entries = {key: value for key, value in header.items() if key != "__metadata__"}
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{_OP}: {self.path} is no safetensors file: {error}") from None
        if not name:
            if len(entries) != 1:
                raise ValueError(
                    f"{_OP}: {self.path} holds {len(entries)} tensors; wanted one, or FILE::NAME "
                    f"with one of {sorted(entries)}"
                )
            (name,) = entries
        if name not in entries:
            raise ValueError(f"{_OP}: {self.path} has no {name!r}, but {sorted(entries)}")
        entry = entries[name]
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise ValueError(f"{_OP}: {name} in {self.path} has no dtype, shape and data_offsets")
        if entry["dtype"] not in _SAFETENSORS:
            raise TypeError(f"{_OP}: {name} in {self.path} is {entry['dtype']}, wanted {wanted}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _counts(shape) or len(shape) != 2:
            raise ValueError(f"{_OP}: {name} in {self.path} has shape {shape}, wanted (m, n)")
        self._dtype, self._swapped = _SAFETENSORS[entry["dtype"]], False
        self._shape = (shape[0], shape[1])
        size = shape[0] * shape[1] * self._dtype.itemsize
        if not _counts(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
            raise ValueError(
                f"{_OP}: {name} in {self.path} has data_offsets {offsets}, wanted {size} bytes for "
                f"shape {shape} of {entry['dtype']}"
            )
        self._offset = 8 + length + offsets[0]

    def blocks(self) -> Iterator[Tensor]:
        m, n = self._shape
        size = self._dtype.itemsize
        # The queue, one being computed with and one being read.
        ring = torch.empty(_QUEUE + 2, self._rows, n, dtype=self._dtype, device="cpu")
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._offset)
            for number, first in enumerate(range(0, m, self._rows)):
                block = ring[number % len(ring)][: min(self._rows, m - first)]
                view = memoryview(block.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
                have = 0
                while have < len(view):
                    count = file.readinto(view[have:])
                    if not count:
                        raise ValueError(f"{_OP}: {self.path} became shorter while it was read")
                    have += count
                if self._swapped:
                    np.frombuffer(view, dtype=f"u{size}").byteswap(inplace=True)
                yield block


def _counts(values: Any) -> bool:
    """Whether this, from a header, is a list of non-negative integers."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def open_source(blocks: Any, block_rows: int | None) -> Source:
    if isinstance(blocks, (str, os.PathLike)):
        return MatrixFile(os.fspath(blocks), block_rows)
    if isinstance(blocks, Iterator):
        raise TypeError(
            f"{_OP}: blocks is an iterator, which ends after one sweep; wanted a callable that "
            "returns a new one"
        )
    if not callable(blocks):
        raise TypeError(
            f"{_OP}: blocks must be a path or a callable that returns an iterator of row blocks, "
            f"got {type(blocks).__name__}"
        )
    if block_rows is not None:
        raise ValueError(f"{_OP}: block_rows is for files; a callable cuts its blocks itself")
    return Source(blocks)


def _tensor(block: Any) -> Tensor:
    """A dense or CSR tensor of a block of either, torch's, NumPy's or SciPy's: a copy, because the
    reader is blocks ahead and whoever gives them may fill one buffer again and again."""
    if isinstance(block, np.ma.MaskedArray):
        raise TypeError(f"{_OP}: a block is a masked array, wanted one without; see filled()")
    if isinstance(block, np.ndarray):
        _check_numpy(block)
        block = torch.from_numpy(np.array(block, order="C"))
    elif getattr(block, "format", None) == "csr" and hasattr(block, "indptr"):
        _check_numpy(block.data)
        block = block.copy()
        try:
            block.check_format()
        except ValueError as error:
            raise ValueError(f"{_OP}: a block is no valid CSR matrix: {error}") from error
        block.sum_duplicates()  # and sorts
        block = torch.sparse_csr_tensor(
            torch.from_numpy(block.indptr),
            torch.from_numpy(block.indices),
            torch.from_numpy(block.data),
            block.shape,
            check_invariants=False,  # below
        )
    elif isinstance(block, Tensor):
        block = block.detach().clone()
    else:
        raise TypeError(
            f"{_OP}: a block is {type(block).__name__}, wanted a dense or CSR tensor or array"
        )
    if block.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(f"{_OP}: a block has layout {block.layout}, wanted dense or CSR")
    if block.dtype not in _SAFETENSORS.values():
        raise TypeError(
            f"{_OP}: a block is {block.dtype}, wanted float64, float32, bfloat16 or float16"
        )
    if block.dim() != 2:
        raise ValueError(f"{_OP}: a block has shape {tuple(block.shape)}, wanted (rows, n)")
    if block.layout == torch.sparse_csr:
        _check_csr(block)
    return block


def _check_numpy(array: Any) -> None:
    kind = array.dtype
    if kind.kind not in "fiu" or not kind.isnative or kind.itemsize > 8:
        raise TypeError(f"{_OP}: a block is an array of {kind}, wanted native floats")


def _check_csr(block: Tensor) -> None:
    crow, col, values = block.crow_indices(), block.col_indices(), block.values()
    try:
        torch.sparse_csr_tensor(crow, col, values, block.shape, check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"{_OP}: a block is no valid CSR tensor: {error}") from error
    if max(len(col), *block.shape) >= 2**31:  # MKL and cuSPARSE count in 32 bits
        raise ValueError(
            f"{_OP}: a CSR block of shape {tuple(block.shape)} has {len(col)} non-zeros, wanted "
            "less than 2^31 of each"
        )


@contextmanager
def reading_ahead(source: Source, device: torch.device) -> Iterator[Iterator[Tensor]]:
    """The blocks of a sweep, on `device`, read by a thread of their own while others are computed
    with. On CUDA its work is queued in the caller's current stream, as that of the caller is."""
    waiting: queue.Queue[Any] = queue.Queue(_QUEUE)
    stop = threading.Event()
    stream: Any = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.stream(torch.cuda.current_stream(device))

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.05)
                return True
            except queue.Full:
                pass
        return False

    def read() -> None:
        try:
            with stream:
                for block in source.blocks():
                    if not put((block, None)):
                        return
            put((None, None))
        except BaseException as error:  # raised where the blocks are wanted
            put((None, error))

    thread = threading.Thread(target=read, name="structmat reader", daemon=True)

    def blocks() -> Iterator[Tensor]:
        while True:
            block, error = waiting.get()
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # whose traceback holds this frame
            if block is None:
                return
            yield block

    thread.start()
    try:
        yield blocks()
    finally:
        stop.set()
        thread.join()
