# SPDX-License-Identifier: Apache-2.0
"""The two indices of a matrix: how tall blocks of vectors over one are added up and
orthonormalised, whole or in shards that the ranks of a process group hold.

A tall block ``Y (size, b)`` is the stack of what the ranks hold. QR is that of Demmel, Grigori,
Hoemmen, Langou, SIAM J. Sci. Comput. 34 (2012): each rank factors its rows, and all factor the same
stack of triangles, so that every rank has the same bits of R.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .random import gaussian

_T = TypeVar("_T")
_QR_ROWS = 8192  # of a QR; longer ones do not stay in the cache
_CHUNK = 4096  # rows of a random matrix that share a stream
_SKETCH, _FRESH = 0, 1 << 31  # first streams of sketches and of replacements for dependent columns


def gathered(group: Any, value: Any) -> list[Any]:
    """A picklable value of each rank."""
    if group is None:
        return [value]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, value, group=group)
    return every


def together(op: str, group: Any, work: Callable[[], _T]) -> _T:
    """``work()``. Raises everywhere if it did on one rank: the others would wait for it for ever.
    To be called by all ranks; `work` itself must not talk to them."""
    failure: BaseException | None = None
    found: Any = None
    try:
        found = work()
    except BaseException as error:
        failure = error
    if isinstance(group, dist.ProcessGroup):  # what else it may be, `work` has refused
        every = gathered(group, None if failure is None else str(failure) or repr(failure))
        other = next((i for i, text in enumerate(every) if text is not None), None)
        if failure is None and other is not None:
            failure = RuntimeError(f"{op}: rank {other} of the group failed: {every[other]}")
    if failure is not None:
        try:
            raise failure
        finally:
            del failure, found  # the traceback holds this frame, and so what the work had
    result: _T = found
    return result


def require_same(op: str, group: Any, facts: dict[str, Any]) -> None:
    """Raises on every rank if facts of two differ: otherwise they would wait for ever."""
    first, *others = gathered(group, facts)
    for rank, found in enumerate(others, 1):
        for name, value in first.items():
            if found[name] != value:
                raise ValueError(
                    f"{op}: {name} is {value} on rank 0 of the group and {found[name]} on {rank}"
                )


class Side:
    """``size`` indices, of which ``count`` from ``first`` on lie here. ``peers`` is the group whose
    ranks each have all of them and do the same with them."""

    def __init__(
        self,
        size: int,
        group: Any = None,
        counts: list[int] | None = None,
        peers: Any = None,
    ) -> None:
        self.size, self.group = size, group
        self._everyone = peers if group is None else group
        self.counts = [size] if counts is None else counts  # of the ranks
        rank = 0 if group is None else dist.get_rank(group)
        self.first, self.count = sum(self.counts[:rank]), self.counts[rank]
        self._fresh = _FRESH

    @staticmethod
    def of_shard(count: int, group: Any, device: torch.device) -> "Side":
        """The side of which this rank holds ``count`` indices."""
        if group is None:
            return Side(count)
        found = torch.tensor([count], device=device)
        every = [torch.empty_like(found) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, found, group=group)
        counts = [int(c) for c in every]
        return Side(sum(counts), group, counts)

    def sum(self, x: Tensor) -> Tensor:
        """``x`` added up over the shards, in place; the same bits on every rank."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def gather(self, x: Tensor) -> list[Tensor]:
        """``x``, of one shape everywhere, of each rank."""
        if self.group is None:
            return [x]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def same(self, *tensors: Tensor) -> None:
        """Overwrites tensors with those of the first rank: ranks of other make may round apart."""
        if self._everyone is not None:
            for x in tensors:
                dist.broadcast(x, group_src=0, group=self._everyone)

    def agreed(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Numbers as the first rank has them: what ranks branch on must not differ by rounding."""
        if self._everyone is None:
            return list(numbers)
        x = torch.tensor(numbers, dtype=torch.float64, device=device)
        self.same(x)
        found: list[float] = x.tolist()
        return found

    def gaussian(self, cols: int, seed: int, stream: int, like: Tensor) -> Tensor:
        """Rows ``first ..`` of a random matrix ``(size, cols)``, however it is sharded. Rows of
        each 4096 have a stream of their own, so that nobody generates those before his."""
        first, last = self.first, self.first + self.count
        parts = [
            gaussian(
                min(last - start, _CHUNK),
                cols,
                seed=seed,
                stream=(stream + start // _CHUNK) % 2**32,
                dtype=like.dtype,
                device=like.device,
            )[max(first - start, 0) :]
            for start in range(first // _CHUNK * _CHUNK, last, _CHUNK)
        ]
        return torch.cat(parts) if parts else like.new_empty(0, cols)

    def sketch(self, cols: int, seed: int, number: int, like: Tensor) -> Tensor:
        """Random matrix ``number`` of those that a decomposition draws."""
        return self.gaussian(cols, seed, _SKETCH + number * (1 << 24), like)

    def means(self, Y: Tensor) -> Tensor:
        return (self.sum(Y.sum(0, dtype=torch.float64)) / self.size).to(Y.dtype)

    def inner(self, X: Tensor, Y: Tensor) -> Tensor:
        """``X^T Y``"""
        return self.sum(X.mT @ Y)

    def qr(self, Y: Tensor, *, factor: bool = True) -> tuple[Tensor, Tensor]:
        """Q with orthonormal columns whatever Y is, and R, of ``Y (size, b)``, ``b <= size``.
        Without `factor` Q is empty, and a third of the work is left."""
        mode = "reduced" if factor else "r"

        def local() -> tuple[Tensor, Tensor]:
            if len(Y) <= 2 * _QR_ROWS:
                return torch.linalg.qr(Y, mode)
            parts = [torch.linalg.qr(part, mode) for part in Y.split(_QR_ROWS)]
            merged, R = torch.linalg.qr(torch.cat([R for _, R in parts]), mode)
            if not factor:
                return merged, R
            start = 0
            Q = Y.new_empty(Y.shape)
            for out, (part, _) in zip(Q.split(_QR_ROWS), parts, strict=True):
                torch.mm(part, merged[start : start + part.shape[1]], out=out)
                start += part.shape[1]
            return Q, R

        Q, R = together("QR", self._everyone, local)  # where memory may end
        if self.group is None:
            return Q, R
        b = Y.shape[1]
        padded = R.new_zeros(b, b)  # a shard may have fewer rows
        padded[: len(R)] = R
        # Without the padding: Q has something for dependent columns, which must not fall there.
        lengths = [min(count, b) for count in self.counts]
        stack = [part[:n] for part, n in zip(self.gather(padded), lengths, strict=True)]
        merged, R = torch.linalg.qr(torch.cat(stack))
        if not factor:
            return Q, R
        start = sum(lengths[: dist.get_rank(self.group)])
        return Q @ merged[start : start + Q.shape[1]], R

    def orthonormalize(self, Y: Tensor, before: Tensor | None, seed: int) -> Tensor:
        """A basis of span(Y), orthogonal to the orthonormal `before`. Columns that bring nothing
        new to rounding are replaced by random ones."""
        eps = torch.finfo(Y.dtype).eps
        Y = self._scaled(Y)
        Q, dependent, weak = self._independent(Y, before, 32 * eps)
        if dependent.any():
            # Householder's Q has something in their place, often a unit vector, which can be what a
            # column to the right would have brought. A random direction takes some of each only.
            noise = self._random(dependent, seed, Y) * (4 * eps)
            Y = Y.index_add(1, dependent.nonzero()[:, 0], noise)
            Q, _, weak = self._independent(Y, before, 0)
        if weak.any():
            Q = Q.index_copy(1, weak.nonzero()[:, 0], self._random(weak, seed, Y))
            Q, _, _ = self._independent(Q, before, 0)
            Q, _, _ = self._independent(Q, before, 0)
        return Q

    def _random(self, columns: Tensor, seed: int, like: Tensor) -> Tensor:
        """A column of norm about 1 for each that is true."""
        self._fresh += 1 << 20
        return self.gaussian(int(columns.sum()), seed, self._fresh, like) / self.size**0.5

    def _independent(
        self, Y: Tensor, before: Tensor | None, tolerance: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Q; which columns lay in the span of `before` and the columns to their left; and where Q
        had only rounding to go by, most of which lay in the span of `before`."""
        if before is None or before.shape[1] == 0:
            Q, R = self.qr(Y)
            found = R.diagonal().abs()
            return Q, *self._masks(found <= tolerance, found < 0)  # none
        # Twice: what the first projection leaves of a small remainder is not orthogonal.
        Q, first = self.qr(Y - before @ self.inner(before, Y))
        Q, second = self.qr(Q - before @ self.inner(before, Q))
        dependent, weak = first.diagonal().abs() <= tolerance, second.diagonal().abs() < 0.5
        return Q, *self._masks(dependent, weak)

    def _masks(self, dependent: Tensor, weak: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the first rank, so that all replace the same columns."""
        both = torch.stack([dependent, weak]).to(torch.uint8)
        self.same(both)
        return both[0].bool(), both[1].bool()

    def _scaled(self, Y: Tensor) -> Tensor:
        """Columns of norm 1; zeros stay. Squares neither overflow nor vanish."""
        largest = Y.abs().amax(0) if len(Y) else Y.new_zeros(Y.shape[1])
        self.max(largest)
        Y = Y / torch.where(largest > 0, largest, 1)
        norms = self.sum(Y.square().sum(0, dtype=torch.float64)).sqrt()
        return Y / torch.where(norms > 0, norms, 1).to(Y.dtype)

    def signs(self, U: Tensor) -> Tensor:
        """Of the entry of largest magnitude in each column; 1 for a column of zeros."""
        largest = U.new_zeros(U.shape[1])
        if len(U):
            largest = U.gather(0, U.abs().argmax(0)[None])[0]
        stack = torch.stack(self.gather(largest))
        found = stack.gather(0, stack.abs().argmax(0)[None])[0]
        return torch.where(found < 0, -1.0, 1.0).to(U.dtype)
