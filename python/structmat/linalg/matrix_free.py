# SPDX-License-Identifier: Apache-2.0
"""The randomized SVD of whatever offers products: sparse tensors, operators, row shards.

The algorithm is that of csrc/core/svd/svd_algorithm.h, on ``B = A`` or, where A is wide, ``A^T``:
steps of subspace iteration, then two blocks of a Krylov space,
``Q_j = orth(B X_j)``, ``T_j = B^T Q_j``, ``X_{j+1} = T_j`` less its part in ``X_1 .. X_j``;
``[T_1 ..] = X R``, ``R = P S W^T``, ``B ~ (Q W) S (X P)^T``.
With a tolerance the basis grows instead by blocks of doubling width, each of a random block that
four passes bring close to what Q lacks (Martinsson and Voronin, SIAM J. Sci. Comput. 38 (2016)).
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import operands
from .arguments import check
from .certificate import PROBES, Tail, tail
from .operands import Operand
from .sides import require_same, together
from .svd import SVDInfo, SVDResult

_OP = "randomized_svd"
_BLOCKS = 2
_SWEEPS = 5
_FIRST_WIDTH = 32
_PROBE_NUMBER = 100  # sketches before it are those of blocks


def default_oversample(rank: int) -> int:
    return -(-(rank + 8) // 16) * 16 - rank


def randomized_svd(
    A: Any,
    rank: int | None,
    rtol: float | None,
    oversample: int | None,
    sweeps: int | None,
    center: bool,
    seed: int,
    group: Any,
) -> SVDResult:
    """``sm.linalg.randomized_svd`` of anything but a dense tensor of one process."""

    def look() -> None:
        check(A, rank, rtol, oversample, sweeps, center, seed, group)
        if isinstance(A, Tensor) and A.layout == torch.sparse_csr:
            _check_csr(A)

    together(_OP, A.device_mesh.get_group() if _on_mesh(A) else group, look)
    # NumPy's integers may be short or unsigned
    rank, oversample, sweeps = (
        None if value is None else operator.index(value) for value in (rank, oversample, sweeps)
    )
    seed = operator.index(seed)
    if hasattr(A, "device_mesh"):
        return _of_dtensor(A, rank, rtol, oversample, sweeps, center, seed)
    with torch.no_grad(), torch.autocast(torch.device(A.device).type, enabled=False):
        facts: dict[str, Any] = {"columns": A.shape[1], "dtype": operands.working_dtype(A.dtype)}
        facts |= {"device": torch.device(A.device).type, "rank": rank, "rtol": rtol}
        facts |= {"oversample": oversample, "sweeps": sweeps, "center": center, "seed": seed}
        require_same(_OP, group, facts)
        operand = _operand(A, group, center)
        shape = operand.shape
        if 0 in shape:
            raise ValueError(f"{_OP}: A is empty, shape {shape}")
        if rank is not None and rank > min(shape):
            raise ValueError(
                f"{_OP}: rank is {rank}, wanted 1 to {min(shape)} for A of shape {shape}"
            )
        if center:
            operand = operand.centred()
        swapped = shape[0] < shape[1]
        tall = operand.transposed() if swapped else operand
        if rank is not None:
            basis = _fixed_rank(tall, rank, oversample, sweeps, seed)
        else:
            assert rtol is not None
            basis = _fixed_error(tall, rtol, oversample, sweeps, seed)
        return basis.result(operand, rank, rtol, swapped)


def _on_mesh(A: Any) -> bool:
    mesh = getattr(A, "device_mesh", None)
    return mesh is not None and mesh.ndim == 1


def _of_dtensor(
    A: Any,
    rank: int | None,
    rtol: float | None,
    oversample: int | None,
    sweeps: int | None,
    center: bool,
    seed: int,
) -> SVDResult:
    """U sharded as A is; S and Vh on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard  # 0.3 s

    if A.device_mesh.ndim != 1 or tuple(A.placements) != (Shard(0),):
        raise ValueError(
            f"{_OP}: A is a DTensor placed as {A.placements}, wanted its rows sharded over a mesh "
            "of one dimension, [Shard(0)]"
        )
    mesh = A.device_mesh
    shard, group = A.to_local(), mesh.get_group()
    result = randomized_svd(shard, rank, rtol, oversample, sweeps, center, seed, group)
    U, S, Vh = result
    shape = torch.Size((A.shape[0], len(S)))
    out = SVDResult(
        DTensor.from_local(U, mesh, [Shard(0)], shape=shape, stride=(len(S), 1)),
        DTensor.from_local(S, mesh, [Replicate()]),
        DTensor.from_local(Vh, mesh, [Replicate()]),
    )
    out.info = result.info
    return out


def _operand(A: Any, group: Any, center: bool) -> Operand:
    if not isinstance(A, Tensor):
        return operands.products(A, group)
    if A.layout == torch.strided:
        return operands.dense(A, group, center)
    return operands.csr(A.detach(), group)


def _check_csr(A: Tensor) -> None:
    try:
        torch.sparse_csr_tensor(
            A.crow_indices(), A.col_indices(), A.values(), A.shape, check_invariants=True
        )
    except RuntimeError as error:
        raise ValueError(f"{_OP}: A is no valid CSR tensor: {error}") from error


def require_one_length(A: Sequence[Any], group: Any, ranks: Callable[[], list[Any]]) -> None:
    """Raises on every rank of a group if `ranks`, those of the matrices of a list, does on one, or
    if lists differ in how many matrices they have of the group."""
    counts = Counter(a.device_mesh.get_group() for a in A if _on_mesh(a))
    if isinstance(group, dist.ProcessGroup):
        counts = Counter({group: len(A)})
    for one, count in counts.items():
        together(_OP, one, ranks)
        require_same(_OP, one, {"the number of matrices in A": count})


class _Basis:
    """Orthonormal Q (tall) with ``T = B^T Q``, and the probes' part outside Q."""

    def __init__(self, operand: Operand, seed: int) -> None:
        self.operand, self.seed = operand, seed
        self.sweeps = 0
        like = operand.like
        self.Q = like.new_empty(operand.rows.count, 0)
        self.T = like.new_empty(operand.cols.count, 0)
        self.probes: Tensor | None = None  # B G
        self.complete = False
        self.norm: float | None = None
        self.removed: float | None = None  # norm of what centring takes away

    # ---- products ---------------------------------------------------------------------------
    def multiply(self, X: Tensor, *, probe: bool = False) -> Tensor:
        if not probe:
            return self._product(self.operand.matmat, X)
        G = self.operand.cols.sketch(PROBES, self.seed, _PROBE_NUMBER, self.operand.like)
        Y = self._product(self.operand.matmat, torch.cat([X, G], 1))
        self.probes = Y[:, X.shape[1] :]
        return Y[:, : X.shape[1]].contiguous()

    def multiply_transposed(self, Y: Tensor) -> Tensor:
        return self._product(self.operand.rmatmat, Y)

    def _product(self, product: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        self.sweeps += 1
        Y = product(X)
        bad = (~Y.isfinite()).any().double()
        if float(self.operand.cols.max(self.operand.rows.max(bad))):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"{_OP}: A contains NaN or Inf, or its products exceed the range of {X.dtype}"
            )
        return Y

    # ---- growth -----------------------------------------------------------------------------
    def append(self, Y: Tensor) -> None:
        """``orth(Y)`` less its part in Q joins the basis."""
        Q = self.operand.rows.orthonormalize(Y, self.Q, self.seed)
        self.Q = torch.cat([self.Q, Q], 1)
        self.T = torch.cat([self.T, self.multiply_transposed(Q)], 1)

    def fill(self) -> None:
        """The whole space of the small side: the decomposition is exact."""
        side, like = self.operand.cols, self.operand.like
        self.Q, self.T, self.complete = self.Q[:, :0], self.T[:, :0], True
        eye = like.new_zeros(side.count, side.size)
        eye.diagonal(side.first).fill_(1)
        self.append(self.multiply(eye))

    # ---- what was found ---------------------------------------------------------------------
    def factor(self) -> None:
        self.X, R = self.operand.cols.qr(self.T)
        P, self.S, Wh = torch.linalg.svd(R.double())
        self.P, self.W = P.contiguous(), Wh.mT.contiguous()
        rows, device = self.operand.rows, self.operand.like.device
        rows.same(self.P, self.S, self.W)
        if self.norm is None:
            self.norm = self.operand.norm()
        unit = max(float(self.S[0]), self.norm or 0.0) or 1.0
        self.energies = (self.S / unit).square()  # of the triplets
        captured = float(self.energies.sum())
        # Where a mean was taken from products, they err by eps of it too.
        self.eps, self.floor = torch.finfo(self.operand.like.dtype).eps, 0.0
        if self.removed is None:
            self.removed = self.operand.mean_norm()
        if self.removed > 0 and self.norm != 0:
            size = (self.norm or 0.0) or unit * captured**0.5
            ratio = math.hypot(size, self.removed) / size if size else math.inf
            self.eps = min(self.eps * ratio, 0.1)
            self.floor = 8 * self.eps
        probed = None
        if not self.complete:
            assert self.probes is not None
            H = self.probes / unit
            for _ in range(2):
                H = H - self.Q @ rows.inner(self.Q, H)
            probed = rows.inner(H.double(), H.double())
        total = None if self.norm is None else (self.norm / unit) ** 2
        missed, bound = tail(captured, total, probed, self.eps)
        # of ||A||_F^2, as certificate.tail has it
        self.total = total or captured / (1 - missed if missed < 1 else 1)
        facts = [missed, bound, self.total, self.eps, self.floor]
        missed, bound, self.total, self.eps, self.floor = rows.agreed(facts, device)
        self.tail = Tail(missed, bound)

    def error(self, k: int, part: Tail | None = None, *, bound: bool = False) -> float:
        """Relative error, or a bound of it, of the first k triplets."""
        part = part or self.tail
        left = float(self.energies[k:].sum()) / self.total if self.total else 0.0
        if bound:  # the singular values left out err by some eps of the first
            return math.sqrt(left + part.bound) + 8 * self.eps
        return max(math.sqrt(left + part.estimate), self.floor)

    def least_rank(self, rtol: float) -> int | None:
        """The smallest rank whose error is certainly at most rtol."""
        found = self._least_rank(rtol) or 0
        (agreed,) = self.operand.rows.agreed([found], self.operand.like.device)
        return int(agreed) or None

    def _least_rank(self, rtol: float) -> int | None:
        count = len(self.S)
        if self.error(count, bound=True) > rtol:
            return None
        low, high = 1, count
        while low < high:
            middle = (low + high) // 2
            if self.error(middle, bound=True) <= rtol:
                high = middle
            else:
                low = middle + 1
        return low

    def result(
        self, operand: Operand, rank: int | None, rtol: float | None, swapped: bool
    ) -> SVDResult:
        k, converged = rank, True
        if k is None:
            assert rtol is not None
            k = self.least_rank(rtol)
            converged = k is not None
            k = k or len(self.S)
        W, P, S = self.W[:, :k], self.P[:, :k], self.S[:k]
        dtype = operand.like.dtype
        U, V = self.Q @ W.to(dtype), self.X @ P.to(dtype)
        if swapped:
            U, V = V, U
        operand.rows.same(V)
        sign = operand.rows.signs(U)
        S_out = S.to(dtype)
        if not S_out.isfinite().all():
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"{_OP}: a singular value exceeds the range of {dtype}"
            )
        result = SVDResult(U * sign, S_out, (V * sign).mT.contiguous())
        threshold = max(operand.shape) * torch.finfo(dtype).eps * float(S[0])
        found = int((threshold < S).sum())
        result.info = info(self.error(k), self.norm or math.nan, found, self.sweeps, converged)
        return result


def info(error: float, norm: float, rank: int, sweeps: int, converged: bool) -> SVDInfo:
    facts = [error, norm, rank, sweeps, 1.0, float(converged)]
    return SVDInfo(torch.tensor(facts, dtype=torch.float64, device="cpu"))


def _fixed_rank(
    operand: Operand, rank: int, oversample: int | None, sweeps: int | None, seed: int
) -> _Basis:
    basis = _Basis(operand, seed)
    rows, cols, like = operand.rows, operand.cols, operand.like
    sweeps = _SWEEPS if sweeps is None else sweeps
    blocks = min(sweeps // 2, _BLOCKS)
    extra = default_oversample(rank) if oversample is None else oversample
    width = min(rank + extra, cols.size)
    if width * blocks >= cols.size:
        basis.fill()
        basis.factor()
        return basis
    steps = sweeps - 2 * blocks
    if steps % 2:
        Y = rows.sketch(width, seed, 0, like)
        X = cols.orthonormalize(basis.multiply_transposed(Y), None, seed)
    else:
        X = cols.sketch(width, seed, 0, like)
    for _ in range(steps // 2):
        Y = rows.orthonormalize(basis.multiply(X), None, seed)
        X = cols.orthonormalize(basis.multiply_transposed(Y), None, seed)
    before = X[:, :0]
    for block in range(blocks):
        if block:
            before = torch.cat([before, X], 1)
            X = cols.orthonormalize(basis.T[:, -width:], before, seed)
        elif not steps:
            X = cols.orthonormalize(X, None, seed)
        basis.append(basis.multiply(X, probe=block == blocks - 1))
    basis.factor()
    return basis


def _fixed_error(
    operand: Operand, rtol: float, oversample: int | None, sweeps: int | None, seed: int
) -> _Basis:
    basis = _Basis(operand, seed)
    rows, cols, like = operand.rows, operand.cols, operand.like
    number = 0
    while True:
        have = basis.Q.shape[1]
        width = max(have, _FIRST_WIDTH)
        budget = math.inf if sweeps is None else sweeps - basis.sweeps
        if have + width >= cols.size and budget >= 2:
            basis.fill()
            basis.factor()
            return basis
        if budget < 2:
            return basis
        X = cols.sketch(width, seed, number, like)
        Y = basis.multiply(X, probe=basis.probes is None)
        if budget >= 4:
            Y = rows.orthonormalize(Y, basis.Q, seed)
            X = cols.orthonormalize(basis.multiply_transposed(Y), None, seed)
            Y = basis.multiply(X)
        basis.append(Y)
        basis.factor()
        number += 1
        enough = basis.least_rank(rtol)
        if enough is not None and enough + (oversample or 0) <= basis.Q.shape[1]:
            return basis
        if (
            basis.tail.bound <= 4 * (8 * basis.eps) ** 2
        ):  # what is left is rounding: no basis gets below it
            return basis
