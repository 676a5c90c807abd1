# SPDX-License-Identifier: Apache-2.0
"""Streams that the ranks of a process group saw parts of, as one."""

from typing import Any

import torch
import torch.distributed as dist

from .sides import require_same, together
from .streaming_checks import SETTINGS
from .streaming_svd import StreamingSVD

_OP = "all_merge"


def all_merge(stream: StreamingSVD, group: Any = None) -> StreamingSVD:
    """Merges the :class:`StreamingSVD` of all ranks, as if the rows of rank 1 had come after those
    of rank 0, and so on. Afterwards every rank has the same state, bit for bit.

    Neighbours merge in a binary tree, and the first rank's state goes to all.

    Args:
        stream: this rank's, of the same settings, dtype and kind of device everywhere. Replaced by
            the merged one.
        group: a ``torch.distributed`` process group; the default one if None.

    Returns:
        ``stream``.

    Raises:
        TypeError: ``stream`` is no StreamingSVD, ``group`` no process group.
        ValueError: settings differ between ranks. Raised on each of them, and nothing is changed.
        RuntimeError: ``torch.distributed`` is not initialised. Or another rank failed: where that
            was in a merge, for want of memory, the streams are lost.

    Cost: ``log2(ranks)`` merges and messages of the size of the state, and one broadcast.

    Example:
        >>> import tempfile, torch, structmat as sm
        >>> store = torch.distributed.FileStore(tempfile.mktemp(), 1)
        >>> torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> stream = sm.linalg.StreamingSVD(4, 2).update(torch.eye(4))
        >>> sm.linalg.all_merge(stream).rows_seen
        4
        >>> torch.distributed.destroy_process_group()
    """
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    require_same(_OP, group, together(_OP, group, lambda: _checked(stream, group)))
    step = 1
    while step < dist.get_world_size(group):
        _merge_neighbours(stream, step, group)
        step *= 2
    parts = _parts(stream)
    for tensor in parts:
        dist.broadcast(tensor, group_src=0, group=group)
    _count(stream, parts[0])
    return stream


def _checked(stream: Any, group: Any) -> dict[str, Any]:
    """What must be the same everywhere."""
    if not isinstance(stream, StreamingSVD):
        raise TypeError(f"{_OP}: stream must be a StreamingSVD, got {type(stream).__name__}")
    if not dist.is_initialized():
        raise RuntimeError(f"{_OP}: torch.distributed is not initialised")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{_OP}: group must be a ProcessGroup, got {type(group).__name__}")
    mine = {name: getattr(stream, name) for name in SETTINGS}
    return mine | {"dtype": stream.dtype, "device": stream.device.type}


def _merge_neighbours(stream: StreamingSVD, step: int, group: Any) -> None:
    """Even multiples of `step` take in the stream of the next one. Each part that may fail is one
    that all ranks go through together."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    takes = rank % (2 * step) == 0 and rank + step < ranks
    gives = rank % (2 * step) == step
    other = together(_OP, group, lambda: _empty_like(stream) if takes else None)
    if gives:
        for tensor in _parts(stream):
            dist.send(tensor, group_dst=rank - step, group=group)
    if other is not None:
        parts = _parts(other)
        for tensor in parts:
            dist.recv(tensor, group_src=rank + step, group=group)
        _count(other, parts[0])
    together(_OP, group, lambda: None if other is None else stream.merge(other))


def _parts(stream: StreamingSVD) -> list[torch.Tensor]:
    counts = torch.tensor([stream.rows_seen, stream._buffered], device=stream.device)
    return [counts, *stream._tensors()]


def _count(stream: StreamingSVD, counts: torch.Tensor) -> None:
    stream.rows_seen, stream._buffered = (int(count) for count in counts)


def _empty_like(stream: StreamingSVD) -> StreamingSVD:
    settings = {name: getattr(stream, name) for name in SETTINGS}
    return StreamingSVD(**settings, dtype=stream.dtype, device=stream.device)
