# SPDX-License-Identifier: Apache-2.0
"""Singular values and right singular vectors of a matrix whose rows arrive in a stream."""

import copy
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import streaming_checks as checks
from .streaming_checks import SETTINGS, STATE, require_no_graph
from .svd import _DTYPES, SVDInfo, SVDResult


class StreamingSVD:
    """The leading singular values and right singular vectors of rows seen once, one at a time or in
    blocks: PCA of a stream.

    After rows ``x_1 .. x_N`` it stands for the matrix ``A (N, n)`` with rows
    ``decay^(N - i) (x_i - mean)``; without ``center`` there is no mean. :meth:`result` gives its
    leading singular values and right singular vectors, ``A ~ U diag(S) Vh`` with ``U`` not kept.

    Where ``n <= 4 l``, ``l = 2 rank + 16`` up to a multiple of 16 (and ``n <= 32766``, as LAPACK
    counts in 32 bits), the state is the matrix ``A^T A`` in float64, and the result is that of all
    rows at once. For wider rows it is a factor ``F (l, n)`` with ``F^T F ~ A^T A``, also float64:
    as soon as ``l`` rows have come, the ``2 l`` rows of ``F`` and these are replaced by their ``l``
    leading right singular vectors times their singular values. It keeps more than twice the rank,
    so that later rows can still raise a direction that was weak so far; the energy left out is
    added up and reported. The result depends on the rows and their order alone, bit for bit: not on
    how they were cut into blocks, whether a block was sparse, or the number of threads.

    Args:
        n_features: ``n``, the width of the rows.
        rank: how many singular values, 1 to ``n``.
        decay: in (0, 1]. Every row multiplies all rows before it by this, hence their share in
            ``A^T A`` and in the mean by ``decay^2``, whatever the blocks. A factor ``f`` per block
            of ``b`` rows is ``f^(1/b)`` here; with ``0.5^(1/(2 h))`` half the share is left after
            ``h`` rows.
        center: measure from the mean of the rows, with the same weights. Rows are centred about the
            mean of their own chunk and one row for the distance of the two means is added (Chan,
            Golub and LeVeque): nothing cancels, however large the mean is.
        seed: 0 to 2^63 - 1; of vectors that the rows do not determine, where they have less than
            ``rank`` directions.
        dtype: of the rows: float32, float64, bfloat16 or float16; torch's default dtype if None.
        device: where rows and state lie; torch's default device if None.

    Attributes:
        rows_seen: ``N``, merged rows included.

    Raises:
        TypeError: an argument is of another type, or the dtype is none of the four.
        ValueError: an argument is out of range; above 32766 columns ``rank`` is at most 4992.

    Cost: with ``n <= 4 l``, ``n^2`` FLOPs a row and ``8 n^2 + 128 n s`` bytes of state, ``s`` the
    bytes of an element. Else ``8 l n + O(l^2)`` FLOPs a row and ``(8 + s) l n`` bytes. Both and
    ``8 n`` for the mean. Float64 throughout. Besides the state, work space: folding a chunk takes
    ``1040 n`` bytes, else ``16 (l + 1) n + 96 l^2``, which the CPU keeps for the next one;
    :meth:`result` takes more, see there.

    Singular values below 1.5e-8 of the first, the root of float64's precision, are lost in
    rounding, for float64 rows as well. Squares of float64 rows neither overflow nor vanish.

    Source: Ross, Lim, Lin, Yang, IJCV 77 (2008), section 3.1; Brand, Linear Algebra Appl. 415
    (2006); Chan, Golub, LeVeque, STAN-CS-79-773 (1979).

    Example:
        >>> import torch, structmat as sm
        >>> rows = torch.randn(1000, 3) @ torch.randn(3, 50) + 7
        >>> pca = sm.linalg.StreamingSVD(50, 3, center=True)
        >>> for block in rows.split(64):
        ...     _ = pca.update(block)
        >>> _, S, Vh = result = pca.result()
        >>> centred = rows - rows.mean(0)
        >>> torch.allclose(centred @ Vh.T @ Vh, centred, atol=1e-3)
        True
        >>> pca.rows_seen, result.info.rank
        (1000, 3)
    """

    def __init__(
        self,
        n_features: int,
        rank: int,
        *,
        decay: float = 1.0,
        center: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        op = "StreamingSVD"
        n_features = checks.integer(op, "n_features", n_features)
        rank, seed = checks.integer(op, "rank", rank), checks.integer(op, "seed", seed)
        if not issubclass(type(decay), Real) or isinstance(decay, bool):
            raise TypeError(f"{op}: decay must be a number, got {type(decay).__name__}")
        if not isinstance(center, bool):
            raise TypeError(f"{op}: center must be a bool, got {type(center).__name__}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise TypeError(
                f"{op}: dtype is {dtype}, wanted one of " + ", ".join(map(str, _DTYPES))
            )
        if n_features < 1:
            raise ValueError(f"{op}: n_features is {n_features}, wanted at least 1")
        if not 1 <= rank <= n_features:
            raise ValueError(f"{op}: rank is {rank}, wanted 1 to n_features, {n_features}")
        if not 0 < decay <= 1:
            raise ValueError(f"{op}: decay is {decay}, wanted more than 0 and at most 1")
        if not 0 <= seed < 2**63:
            raise ValueError(f"{op}: seed is {seed}, wanted 0 to 2^63 - 1")
        self.n_features, self.rank, self.seed = n_features, rank, seed
        self.decay, self.center = float(decay), center
        self.rows_seen = 0
        self._buffered = 0
        try:
            keep, chunk = torch.ops.structmat.streaming_svd_shape(n_features, rank)
        except RuntimeError as error:
            raise ValueError(f"{op}: {error}") from error
        self._buffer = torch.zeros(chunk, n_features, dtype=dtype, device=device)
        self._factor, self._mean, self._facts = (
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((keep, n_features), (n_features,), (2,))
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._buffer.dtype

    @property
    def device(self) -> torch.device:
        return self._buffer.device

    def update(self, rows: Tensor) -> "StreamingSVD":
        """Appends rows.

        Args:
            rows: ``(b, n)``, dense with any strides or sparse CSR, or one row ``(n,)``, of the
                dtype and on the device given at the start. Sparse rows are expanded a chunk at a
                time.

        Returns:
            the object itself.

        Raises:
            TypeError: ``rows`` is no dense or CSR tensor, or of another dtype.
            ValueError: the width or the device differs, or indices of a CSR tensor are wrong.
            RuntimeError: ``rows`` requires grad; pass ``rows.detach()``. Or a CUDA graph is being
                captured, whose replay would not count the rows.
            torch.linalg.LinAlgError: ``rows`` contains NaN or Inf. To know it, the GPU is waited
                for.

            After any of these the state is what it was before the call. Where memory runs out or
            an eigenvalue problem does not converge in a later chunk of ``rows`` than the first,
            the state is lost; go on from a :meth:`state_dict`.

        Example:
            >>> import torch, structmat as sm
            >>> stream = sm.linalg.StreamingSVD(4, 2)
            >>> stream.update(torch.ones(3, 4)).update(torch.ones(4)).rows_seen
            4
        """
        rows = checks.rows(self, rows)
        if rows.layout == torch.sparse_csr:
            parts = (rows.crow_indices().long(), rows.col_indices().long(), rows.values())
            torch.ops.structmat.streaming_svd_update_csr(
                *self._state(), *(t.contiguous() for t in parts)
            )
        else:
            torch.ops.structmat.streaming_svd_update(*self._state(), rows)
        self.rows_seen += rows.shape[0]
        self._buffered = (self._buffered + rows.shape[0]) % self._buffer.shape[0]
        return self

    def merge(self, other: "StreamingSVD") -> "StreamingSVD":
        """Appends all rows that another object has seen, as if they had come after one's own.

        States of parts of a stream, merged in the order of the parts, give the state of the whole
        up to rounding, whichever neighbours merge first. ``decay`` counts the other's rows too.

        Args:
            other: of the same n_features, rank, decay, center, seed, dtype and device. Not changed.

        Returns:
            the object itself.

        Raises:
            TypeError: ``other`` is no StreamingSVD, or of another dtype.
            ValueError: it differs in one of the others.
            RuntimeError: a CUDA graph is being captured.

            After any of these the state is what it was before the call. Where memory runs out or
            an eigenvalue problem does not converge, it is lost.

        Cost: ``2 n^2`` FLOPs where ``n <= 4 l``, else that of ``l`` rows.

        Example:
            >>> import torch, structmat as sm
            >>> parts = [sm.linalg.StreamingSVD(4, 2).update(torch.eye(4) * s) for s in (1, 2)]
            >>> parts[0].merge(parts[1]).rows_seen
            8
        """
        op = "StreamingSVD.merge"
        if not isinstance(other, StreamingSVD):
            raise TypeError(f"{op}: other must be a StreamingSVD, got {type(other).__name__}")
        if other.dtype != self.dtype:
            raise TypeError(f"{op}: other has dtype {other.dtype}, wanted {self.dtype}")
        for name in (*SETTINGS, "device"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"{op}: other has {name} {theirs}, wanted {mine}")
        require_no_graph(op, self._buffer)
        state = [t.clone() if other is self else t for t in other._tensors()]
        seen, buffered = other.rows_seen, other._buffered
        torch.ops.structmat.streaming_svd_merge(*self._state(), *state, seen, buffered)
        self.rows_seen += seen
        if seen > buffered:  # its chunks were joined to all of ours
            self._buffered = buffered
        else:
            self._buffered = (self._buffered + buffered) % self._buffer.shape[0]
        return self

    def result(self) -> SVDResult:
        """The decomposition of all rows so far. The stream can go on afterwards.

        Returns:
            :class:`SVDResult`: ``U`` is None, ``S (rank,)`` descending, ``Vh (rank, n)`` with
            orthonormal rows, of the rows' dtype, float32 for 16-bit rows. The entry of largest
            magnitude of each row of ``Vh`` is positive. With ``center`` and without decay the
            variances along them are ``S^2 / rows_seen``.

            ``.info.error`` is ``||A - A V V^T||_F / ||A||_F``, ``V = Vh^T``: exact where
            ``n <= 4 l``, else an upper bound, from the energy left out so far and the singular
            values beyond ``rank``. Rounding can add up to 1e-6; below 3e-8 it is not known and
            reported as that. ``.info.rank`` counts the values of
            ``S`` that are not zero and above ``n eps S[0]`` and, where ``n <= 4 l``, above
            ``sqrt(n) 1.5e-8 S[0]``; ``.info.sweeps`` is 1.

        Raises:
            ValueError: there were no rows.
            torch.linalg.LinAlgError: a singular value exceeds the range of the dtype, or an
                eigenvalue problem did not converge.
            RuntimeError: a CUDA graph is being captured.

        Cost: where ``n <= 4 l``, all eigenvectors of an ``n x n`` matrix, whatever the rank:
        ``O(n^3)``, 0.16 s for ``n = 1024`` and 1.1 s for 2048 on two cores, and four times the
        memory of the state. Else ``O(l^2 n)``, and up to twice the memory of the state.

        Example:
            >>> import torch, structmat as sm
            >>> _, S, Vh = sm.linalg.StreamingSVD(4, 2).update(torch.eye(4)[:3]).result()
            >>> S.tolist(), tuple(Vh.shape)
            ([1.0, 1.0], (2, 4))
        """
        op = "StreamingSVD.result"
        self._require_rows(op)
        S, Vh, facts = torch.ops.structmat.streaming_svd_result(
            *self._folded(op), *self._settings(), self.rows_seen, self.seed
        )
        if not float(facts[4]):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"{op}: a singular value exceeds the range of its dtype, or an eigenvalue "
                "problem did not converge"
            )
        result = SVDResult(None, S, Vh)  # type: ignore[arg-type]
        result.info = SVDInfo(facts)
        return result

    @property
    def mean(self) -> Tensor:
        """The mean of the rows ``(n,)``, with ``decay`` their weighted mean, of the dtype of ``S``;
        known without ``center`` too. A copy.

        Raises:
            ValueError: there were no rows.
            RuntimeError: a CUDA graph is being captured.

        Cost: that of folding the rows of an unfinished chunk, as in :meth:`result`: where
        ``n > 4 l``, an eigenvalue problem of up to ``2 l`` rows.
        """
        op = "StreamingSVD.mean"
        self._require_rows(op)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self._folded(op)[2].to(dtype, copy=True)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the state, tensors only, for ``safetensors`` or ``torch.save``.

        Example:
            >>> import torch, structmat as sm
            >>> stream = sm.linalg.StreamingSVD(4, 2).update(torch.eye(4))
            >>> again = sm.linalg.StreamingSVD(4, 2).load_state_dict(stream.state_dict())
            >>> bool((again.result().S == stream.result().S).all())
            True
        """
        tensors = [t.clone() for t in (self._buffer[: self._buffered], *self._tensors()[1:])]
        state = dict(zip(STATE, tensors, strict=True))
        for name in (*SETTINGS, "rows_seen"):
            state[name] = torch.tensor(getattr(self, name))
        state["decay"] = torch.tensor(self.decay, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> "StreamingSVD":
        """Takes over a state from :meth:`state_dict`, which may lie on another device.

        Args:
            state: of the same n_features, rank, decay, center, seed and dtype.

        Returns:
            the object itself.

        Raises:
            TypeError: ``state`` is no mapping, a value is no dense tensor or of another dtype.
            ValueError: names, shapes or settings differ, a count is impossible or a number is not
                finite.

            After any of these the state is what it was before the call.
        """
        found, rows = checks.state(self, state)
        buffered = found[0].shape[0]
        buffer = torch.zeros_like(self._buffer)
        buffer[:buffered].copy_(found[0])
        others = [torch.empty_like(own) for own in self._tensors()[1:]]
        for own, value in zip(others, found[1:], strict=True):
            own.copy_(value)
        self._buffer = buffer
        self._factor, self._mean, self._facts = others
        self.rows_seen, self._buffered = rows, buffered
        return self

    def __copy__(self) -> "StreamingSVD":
        return copy.deepcopy(self)  # updates write into the tensors

    def __repr__(self) -> str:
        return (
            f"StreamingSVD(n_features={self.n_features}, rank={self.rank}, decay={self.decay}, "
            f"center={self.center}, seed={self.seed}, dtype={self.dtype}, device='{self.device}', "
            f"rows_seen={self.rows_seen})"
        )

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._buffer, self._factor, self._mean, self._facts

    def _settings(self) -> tuple[int, float, bool]:
        return self.rank, self.decay, self.center

    def _state(self) -> tuple[Any, ...]:
        return (*self._tensors(), *self._settings(), self.rows_seen, self._buffered)

    def _folded(self, op: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The state with nothing buffered. The state itself stays as it is, so that asking for a
        result does not change later ones."""
        require_no_graph(op, self._buffer)
        if self._buffered == 0:
            return self._tensors()
        tensors = (self._buffer, self._factor.clone(), self._mean.clone(), self._facts.clone())
        torch.ops.structmat.streaming_svd_fold(
            *tensors, *self._settings(), self.rows_seen, self._buffered
        )
        return tensors

    def _require_rows(self, op: str) -> None:
        if self.rows_seen == 0:
            raise ValueError(f"{op}: no rows were seen yet")


def _fake(*arguments: Any) -> None:
    return None


for _name in ("update", "update_csr", "fold", "merge"):
    torch.library.register_fake(f"structmat::streaming_svd_{_name}", _fake)


@torch.library.register_fake("structmat::streaming_svd_check")
def _(rows: Tensor) -> Tensor:
    return rows.new_empty((), dtype=torch.float64)


@torch.library.register_fake("structmat::streaming_svd_result")
def _(
    buffer: Tensor,
    factor: Tensor,
    mean: Tensor,
    facts: Tensor,
    rank: int,
    decay: float,
    center: bool,
    seen: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if buffer.dtype == torch.float64 else torch.float32
    return (
        buffer.new_empty((rank,), dtype=dtype),
        buffer.new_empty((rank, buffer.shape[1]), dtype=dtype),
        buffer.new_empty((6,), dtype=torch.float64),
    )
