# SPDX-License-Identifier: Apache-2.0
"""What StreamingSVD takes: rows and states are looked at before its own state changes."""

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .svd import check_integer

if TYPE_CHECKING:
    from .streaming_svd import StreamingSVD

SETTINGS = ("n_features", "rank", "decay", "center", "seed")
STATE = ("buffer", "factor", "mean", "facts")  # StreamingSvdState of structmat/streaming_svd.h


def rows(stream: "StreamingSVD", rows: Tensor) -> Tensor:
    """The rows as a matrix; raises for those the state does not take."""
    op = "StreamingSVD.update"
    if not isinstance(rows, Tensor):
        raise TypeError(f"{op}: rows must be a tensor, got {type(rows).__name__}")
    if rows.layout not in (torch.strided, torch.sparse_csr):
        raise TypeError(f"{op}: rows must be dense or CSR, got layout {rows.layout}")
    if rows.dtype != stream.dtype:
        raise TypeError(f"{op}: rows are {rows.dtype}, wanted {stream.dtype}")
    if rows.device != stream.device:
        raise ValueError(f"{op}: rows are on {rows.device}, wanted {stream.device}")
    if rows.dim() not in (1, 2) or rows.shape[-1] != stream.n_features:
        raise ValueError(
            f"{op}: rows have shape {tuple(rows.shape)}, wanted (b, {stream.n_features}) or "
            f"({stream.n_features},)"
        )
    if rows.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: rows require grad, but have no gradient here; detach them")
    require_no_graph(op, stream._buffer)
    rows = rows.detach()
    values = rows
    if rows.layout == torch.sparse_csr:
        try:
            torch.sparse_csr_tensor(
                rows.crow_indices(),
                rows.col_indices(),
                rows.values(),
                rows.shape,
                check_invariants=True,
            )
        except RuntimeError as error:
            raise ValueError(f"{op}: rows are no valid CSR tensor: {error}") from error
        values = rows.values()
    if rows.dim() == 1:
        rows = values = rows[None]
    if values.dim() == 1:
        values = values[None]
    if not float(torch.ops.structmat.streaming_svd_check(values)):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"{op}: rows contain NaN or Inf"
        )
    return rows


def state(stream: "StreamingSVD", state: Any) -> tuple[list[Tensor], int]:
    """The tensors of a ``state_dict`` of such a stream, and how many rows it has seen."""
    op = "StreamingSVD.load_state_dict"
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state must be a mapping, got {type(state).__name__}")
    wanted = {*STATE, *SETTINGS, "rows_seen"}
    if set(state) != wanted:
        raise ValueError(
            f"{op}: missing {sorted(wanted - set(state))}, "
            f"unknown {sorted(set(state) - wanted, key=str)}"
        )
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            raise TypeError(
                f"{op}: {name} must be dense, got layout {value.layout} on {value.device}"
            )
        if name not in STATE and value.numel() != 1:
            raise ValueError(f"{op}: {name} has {value.numel()} elements, wanted 1")
    for name in SETTINGS:
        mine, theirs = getattr(stream, name), state[name].item()
        if mine != theirs:
            raise ValueError(f"{op}: the state has {name} {theirs}, wanted {mine}")
    found = [state[name].detach() for name in STATE]
    buffered = found[0].shape[0] if found[0].dim() == 2 else -1
    for name, value, own in zip(STATE, found, stream._tensors(), strict=True):
        shape = (buffered, stream.n_features) if name == "buffer" else tuple(own.shape)
        if value.dtype != own.dtype:
            raise TypeError(f"{op}: {name} has dtype {value.dtype}, wanted {own.dtype}")
        if tuple(value.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, wanted {shape}")
        if not value.isfinite().all():
            raise ValueError(f"{op}: {name} contains NaN or Inf")
    lost, largest = found[3].tolist()
    if lost < 0 or largest < 0 or (largest > 0 and stream.dtype != torch.float64):
        raise ValueError(f"{op}: facts are {lost} and {largest}, which no rows lead to")
    rows = state["rows_seen"].item()
    if not isinstance(rows, int) or isinstance(rows, bool):
        raise ValueError(f"{op}: rows_seen is {rows}, wanted an integer")
    if not 0 <= buffered < stream._buffer.shape[0] or buffered > rows:
        raise ValueError(f"{op}: {buffered} rows of {rows} are in the buffer, wanted fewer")
    return found, rows


def integer(op: str, name: str, value: Any) -> int:
    check_integer(name, value, op)
    return operator.index(value)


def require_no_graph(op: str, tensor: Tensor) -> None:
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: a CUDA graph is being captured, wanted none: its replay would not count rows"
        )
