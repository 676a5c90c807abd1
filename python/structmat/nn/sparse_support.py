# SPDX-License-Identifier: Apache-2.0
"""A layer's support, whose index lies in buffers."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..sparse_pattern import SparsePattern
from ..sparse_pattern.state import from_index

_Layer = TypeVar("_Layer", bound="SparseSupport")


class SparseSupport(nn.Module):
    """What :class:`SparseLowRankLinear` knows of its support: taken from the buffers ``starts`` and
    ``columns`` when it is used, moved and loaded with them."""

    in_features: int
    out_features: int
    density: float
    family: str
    values: nn.Parameter
    starts: Tensor
    columns: Tensor

    def _take(self, pattern: SparsePattern) -> None:
        self.register_buffer("starts", pattern.starts)
        # NCCL and gloo know no uint16; DistributedDataParallel broadcasts buffers.
        self.register_buffer("columns", pattern.columns.view(torch.uint8))
        self._hold(pattern)

    def _hold(self, pattern: SparsePattern | None) -> None:
        """Remembers of which buffers, in which state, the pattern is; ``None``: of no pattern."""
        self._pattern = pattern
        self._taken = self.starts, self.columns
        self._versions = _version(self.starts), _version(self.columns)

    def _around_buffers(self, nnz: int, seed: int | None = None) -> SparsePattern:
        shape = self.out_features, self.in_features
        columns = self.columns.view(torch.uint16)
        return SparsePattern._of(shape, self.family, self.starts, columns, nnz, seed)

    @property
    def pattern(self) -> SparsePattern:
        """The support, on the device of the layer.

        Buffers that were replaced or written to, as EMA and DistributedDataParallel do, are checked
        and taken at the next use, under ``torch.compile`` only where they were replaced.

        Raises:
            RuntimeError: nothing is known of the support: the layer has left the meta device, or
                was emptied, and no seed tells it.
            ValueError: the buffers hold no pattern.
        """
        starts, columns = self._taken
        same = starts is self.starts and columns is self.columns
        if torch.compiler.is_compiling():  # where an index cannot be checked
            if not same or self._pattern is None:
                made = self._around_buffers(self.values.numel())
                if torch.compiler.is_exporting():  # with stand-ins for the buffers
                    return made
                self._pattern, self._taken = made, (self.starts, self.columns)
                self._versions = -1, -1
            return self._pattern
        if same and self._versions == (_version(starts), _version(columns)):
            if self._pattern is None:
                raise RuntimeError(
                    "SparseLowRankLinear: the support was lost on the meta device or by to_empty, "
                    "and has no seed; load_state_dict gives it one"
                )
            return self._pattern
        held, index = self._pattern, self.columns.view(torch.uint16)
        if self.columns.is_meta:
            self._hold(self._around_buffers(self.values.numel()))
        elif held is None or not _same_index(held, self.starts, index):
            # Around a copy, which tells whether the next write changes anything.
            op, shape = "SparseLowRankLinear", (self.out_features, self.in_features)
            self._hold(from_index(SparsePattern, op, *shape, self.family, self.starts, index))
        else:
            self._hold(held)
        return self._pattern  # type: ignore[return-value]

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        was = None if self._pattern is None else self.pattern
        starts, columns = self._taken
        super()._apply(fn, recurse)
        if self.starts is starts and self.columns is columns:
            return self
        if self.columns.is_meta:
            nnz = self.values.numel() if was is None else was.nnz
            self._hold(self._around_buffers(nnz, None if was is None else was.seed))
        elif was is not None and _same_index(was, self.starts, self.columns.view(torch.uint16)):
            moved = self._around_buffers(was.nnz, was.seed)
            if was._transposed is not None:
                other, permutation = was._transposed
                moved._transposed = other.to(moved.device), permutation.to(moved.device)
            self._hold(moved)
        elif was is not None and was.seed is not None:  # to_empty leaves it to us what is there
            m, n, device = self.out_features, self.in_features, self.columns.device
            like: dict[str, Any] = {"family": self.family, "seed": was.seed, "device": device}
            self._take(SparsePattern.random(m, n, self.density, **like))
        else:
            self._hold(None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self._pattern is not None:
            self.pattern  # noqa: B018  takes what was written to the buffers
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._hold(self._pattern)  # versions of copies begin anew

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The support comes from the state with the values, both checked before either is taken,
        and may differ in its number of entries."""
        names = "values", "starts", "columns"
        given = [state_dict.get(prefix + name) for name in names]
        rest = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        if not any(a is not None for a in given):
            super()._load_from_state_dict(state_dict, prefix, *rest)
            return
        missing = [prefix + n for n, a in zip(names, given, strict=True) if a is None]
        if missing:
            error_msgs.append(
                f"SparseLowRankLinear: {', '.join(missing)} missing; {prefix}values, "
                f"{prefix}starts and {prefix}columns load together"
            )
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        pattern = None
        if not any(isinstance(a, Tensor) and a.is_meta for a in given) and (
            assign or not self.values.is_meta  # else torch warns that nothing is loaded
        ):
            try:
                pattern = self._read(*given)
            except (TypeError, ValueError, RuntimeError) as error:
                error_msgs.append(
                    f"SparseLowRankLinear: {prefix}values, {prefix}starts and {prefix}columns are "
                    f"not of a support of family {self.family!r}: {error}"
                )
                return
            held = self._pattern
            if held is None or held.device.type == "meta" or pattern != self.pattern:
                if pattern.nnz != self.values.numel():
                    self.values.data = self.values.data.new_empty(pattern.nnz)
                    self.values.grad = None
                    self.density = pattern.density  # so that reselect keeps the number
                if not self.values.is_meta:
                    pattern = pattern.to(self.values.device)
                self._take(pattern)
            else:
                pattern = held
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if pattern is not None:
            self._hold(self._around_buffers(pattern.nnz, pattern.seed))

    def _read(self, values: Any, starts: Any, columns: Any) -> SparsePattern:
        for name, a in {"values": values, "starts": starts, "columns": columns}.items():
            if not isinstance(a, Tensor):
                raise TypeError(f"{name} is no tensor")
        if columns.dtype != torch.uint8:
            raise TypeError(f"columns is {columns.dtype}, wanted torch.uint8")
        op, shape = "SparseLowRankLinear.load_state_dict", (self.out_features, self.in_features)
        index = starts, columns.view(torch.uint16)
        pattern = from_index(SparsePattern, op, *shape, self.family, *index)
        if tuple(values.shape) != (pattern.nnz,):
            raise ValueError(f"values is {tuple(values.shape)}, the support has {pattern.nnz}")
        return pattern


def _version(index: Tensor) -> int:
    return -1 if index.is_inference() else index._version


def _same_index(pattern: SparsePattern, starts: Tensor, columns: Tensor) -> bool:
    """Whether an index elsewhere is known to be that of a pattern."""
    here = pattern.columns
    if here.is_meta or here.data_ptr() == columns.data_ptr() or here.shape != columns.shape:
        return False
    a, b = here.view(torch.uint8), columns.view(torch.uint8)
    return torch.equal(pattern.starts.to(starts.device), starts) and torch.equal(a.to(b.device), b)
