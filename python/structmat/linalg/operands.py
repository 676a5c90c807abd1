# SPDX-License-Identifier: Apache-2.0
"""What a randomized decomposition needs of a matrix: products with tall blocks.

An :class:`Operand` stands for ``A (m, n)`` with rows whole or sharded over a process group:
``matmat``: ``X (n, b) -> A X``; ``rmatmat``: ``Y (m, b) -> A^T Y``, summed over the shards;
``norm``: ``||A||_F``, None where products are all there is.
"""

from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from .sides import Side, together

_NONZEROS = 2**30  # of a CSR product: MKL and cuSPARSE count in 32 bits


class Operand:
    def __init__(
        self,
        rows: Side,
        cols: Side,
        like: Tensor,
        matmat: Callable[[Tensor], Tensor],
        rmatmat: Callable[[Tensor], Tensor],
        norm: Callable[[bool], float | None],
    ) -> None:
        self.rows, self.cols, self.like = rows, cols, like  # like: dtype and device of the blocks
        self.matmat, self.rmatmat = matmat, rmatmat
        self._norm, self._centred = norm, False
        self.mean_norm: Callable[[], float] = lambda: 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows.size, self.cols.size

    def norm(self) -> float | None:
        return self._norm(self._centred)

    def centred(self) -> "Operand":
        """``C A`` with ``C = I - 1 1^T / m``, which subtracts the mean of the rows. Applied to the
        blocks: A itself, sparse or not, stays as it is. ``mean_norm()`` is that of the part of A
        that is taken away, ``||1 1^T A / m||_F``: products err by eps of it."""

        def centre(Y: Tensor) -> Tensor:
            return Y - self.rows.means(Y)

        def mean_norm() -> float:
            ones = self.like.new_full((self.rows.count, 1), self.rows.size**-0.5)
            return norm_of([self.rmatmat(ones)], Side(0), self.like)

        out = Operand(
            self.rows,
            self.cols,
            self.like,
            lambda X: centre(self.matmat(X)),
            lambda Y: self.rmatmat(centre(Y)),
            self._norm,
        )
        out._centred, out.mean_norm = True, mean_norm
        return out

    def transposed(self) -> "Operand":
        out = Operand(self.cols, self.rows, self.like, self.rmatmat, self.matmat, self._norm)
        out._centred, out.mean_norm = self._centred, self.mean_norm
        return out


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_of(parts: Iterable[Tensor], rows: Side, like: Tensor) -> float:
    """``sqrt(sum of squares)`` of all numbers in `parts`, summed in float64 over the ranks; squares
    neither overflow nor vanish."""
    scale, total = 0.0, 0.0
    for part in parts:
        x = part.double()
        largest = float(x.abs().max()) if x.numel() else 0.0
        if largest == 0:
            continue
        if not largest < float("inf"):
            scale, total = largest, 1.0
            break
        squares = float((x / largest).square().sum())
        larger = max(scale, largest)
        total = total * (scale / larger) ** 2 + squares * (largest / larger) ** 2
        scale = larger
    pair = torch.tensor([scale, total], dtype=torch.float64, device=like.device)
    every = torch.stack(rows.gather(pair)).cpu()
    largest = float(every[:, 0].max())
    if not 0 < largest < float("inf"):
        return largest
    return largest * float(((every[:, 0] / largest) ** 2 * every[:, 1]).sum()) ** 0.5


def shards(A: Any, group: Any, device: torch.device) -> tuple[Side, Side]:
    """The sides of a matrix of which this rank holds the rows ``A``."""
    m, n = A.shape
    return Side.of_shard(m, group, device), Side(n, peers=group)


def _shared(
    rows: Side, matmat: Callable[[Tensor], Tensor], rmatmat: Callable[[Tensor], Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Products of all shards from those with this one, which raise everywhere if they do on one."""

    def local(product: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        return together("randomized_svd", rows.group, lambda: product(X))

    return lambda X: local(matmat, X), lambda Y: rows.sum(local(rmatmat, Y))


def dense(A: Tensor, group: Any, center: bool = False) -> Operand:
    """Rows in memory, 16-bit ones converted a part at a time. To be centred, the mean leaves A a
    part at a time too: taken from the products, it would leave them its own rounding."""
    rows, cols = shards(A, group, A.device)
    dtype = working_dtype(A.dtype)
    step = max(1, 2**24 // max(A.shape[1], 1))

    def means() -> Tensor:
        total = torch.zeros(A.shape[1], dtype=torch.float64, device=A.device)
        for part in A.split(step // 8 + 1):
            total += part.sum(0, dtype=torch.float64)
        return rows.sum(total) / max(rows.size, 1)

    shift = means().to(dtype) if center else None
    whole = dtype == A.dtype and shift is None

    def panel(part: Tensor) -> Tensor:
        part = part.to(dtype)
        return part if shift is None else part - shift

    def matmat(X: Tensor) -> Tensor:
        if whole:
            return A @ X
        parts = [panel(part) @ X for part in A.split(step)]
        return torch.cat(parts) if parts else X.new_zeros(0, X.shape[1])

    def rmatmat(Y: Tensor) -> Tensor:
        if whole:
            return A.mT @ Y
        out = Y.new_zeros(A.shape[1], Y.shape[1])
        for part, y in zip(A.split(step), Y.split(step), strict=True):
            out += panel(part).mT @ y
        return out

    def norm(centred: bool) -> float:
        parts = A.split(step // 8 + 1)
        if not centred:
            return norm_of(parts, rows, A)
        mean = means()
        return norm_of((part.double() - mean for part in parts), rows, A)

    like = A.new_empty(0, dtype=dtype)
    return Operand(rows, cols, like, *_shared(rows, matmat, rmatmat), norm)


def csr(A: Tensor, group: Any, limit: int = _NONZEROS) -> Operand:
    """A CSR tensor. Indices are kept in 32 bits and A^T as CSR beside A: for 200,000 x 20,000 with
    4 M non-zeros, times 64 columns, A takes 23 ms with 32-bit and 68 ms with 64-bit indices, and
    ``A.t() @ Y``, for which torch converts A in every call, 750 ms against 240 ms with the copy."""
    rows, cols = shards(A, group, A.device)
    m, n = A.shape
    crow, col = A.crow_indices(), A.col_indices()
    parts, transposes = [], []

    def convert() -> Tensor:
        values = A.values().to(working_dtype(A.dtype))
        for first, last in pairwise(_cuts(crow, limit)):
            begin, end = int(crow[first]), int(crow[last])
            if end == begin:
                continue
            part = torch.sparse_csr_tensor(
                (crow[first : last + 1] - begin).int(),
                col[begin:end].int(),
                values[begin:end],
                (last - first, n),
                check_invariants=False,
            )
            parts.append((first, last, part))
            transposes.append((first, last, part.t().to_sparse_csr()))
        return values

    values = together("randomized_svd", group, convert)  # where memory may end

    def matmat(X: Tensor) -> Tensor:
        out = X.new_zeros(m, X.shape[1])
        for first, last, part in parts:
            out[first:last] = part @ X
        return out

    def rmatmat(Y: Tensor) -> Tensor:
        out = Y.new_zeros(n, Y.shape[1])
        for first, last, part in transposes:
            out += part @ Y[first:last].contiguous()
        return out

    def norm(centred: bool) -> float:
        if not centred:
            return norm_of(values.split(2**24), rows, A)
        total = torch.zeros(n, dtype=torch.float64, device=A.device)
        filled = torch.zeros_like(total)
        for _, _, part in transposes:
            ones = torch.ones(part.shape[1], 1, dtype=torch.float64, device=A.device)
            wide = torch.sparse_csr_tensor(
                part.crow_indices(), part.col_indices(), part.values().double(), part.shape,
                check_invariants=False,
            )  # fmt: skip
            total += (wide @ ones)[:, 0]
            filled += part.crow_indices().diff()
        mean = rows.sum(total) / rows.size
        pairs = zip(values.split(2**24), col.split(2**24), strict=True)
        found = (v.double() - mean[c] for v, c in pairs)
        return norm_of(chain(found, [mean * (m - filled).sqrt()]), rows, A)

    return Operand(rows, cols, values.new_empty(0), *_shared(rows, matmat, rmatmat), norm)


def _cuts(crow: Tensor, limit: int) -> list[int]:
    """Rows between which at most `limit` non-zeros lie."""
    m = len(crow) - 1
    if int(crow[-1]) <= limit:
        return [0, m]
    cuts = [0]
    while cuts[-1] < m:
        target = crow[cuts[-1]] + limit
        cuts.append(max(int(torch.searchsorted(crow, target, right=True)) - 1, cuts[-1] + 1))
    return cuts


def products(A: Any, group: Any) -> Operand:
    """An object with .shape .dtype .device .matmat .rmatmat, whose answers are looked at."""
    rows, cols = shards(A, group, torch.device(A.device))
    like = torch.empty(0, dtype=A.dtype, device=A.device)

    def checked(name: str, length: int) -> Callable[[Tensor], Tensor]:
        def local(X: Tensor) -> Tensor:
            Y = getattr(A, name)(X)
            op = f"randomized_svd: A.{name}"
            if not isinstance(Y, Tensor):
                raise TypeError(f"{op} returned {type(Y).__name__}, wanted a tensor")
            if Y.layout != torch.strided:
                raise TypeError(f"{op} returned layout {Y.layout}, wanted a dense tensor")
            if Y.dtype != X.dtype:
                raise TypeError(f"{op} returned {Y.dtype}, wanted {X.dtype}")
            if Y.device != X.device:
                raise ValueError(f"{op} returned a tensor on {Y.device}, wanted {X.device}")
            wanted = (length, X.shape[1])
            if tuple(Y.shape) != wanted:
                raise ValueError(
                    f"{op} returned shape {tuple(Y.shape)} for {tuple(X.shape)}, wanted {wanted}"
                )
            # what is kept must not change with the object's own buffers
            return Y.detach().clone()

        return local

    pair = _shared(rows, checked("matmat", A.shape[0]), checked("rmatmat", A.shape[1]))
    return Operand(rows, cols, like, *pair, lambda centred: None)
