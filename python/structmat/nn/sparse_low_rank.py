# SPDX-License-Identifier: Apache-2.0
"""``y = x (U V + S)^T + b``: a linear layer with a weight of low rank plus a sparse one, beside a
frozen one or without."""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..linalg.svd import check_integer
from ..ops.sparse_low_rank import check_base
from ..sparse_pattern import SparsePattern
from .blocks import check_dtype, check_sizes
from .convert import dense_like, finite_weight
from .product import product
from .reselection import Reselection
from .sparse_support import SparseSupport

if TYPE_CHECKING:
    from ..sparse_low_rank import SparseLowRank

_INITS = ("sltrain", "lost")


class SparseLowRankLinear(SparseSupport):
    """A linear layer with the weight ``W = U V + S``, ``S`` sparse on a fixed support.

    ``y = x (U V + S)^T + bias`` maps ``(..., n)`` to ``(..., m)`` with
    ``rank (m + n) + density m n`` weights instead of ``m n``, and no gradient of ``m n`` numbers
    either. For fine-tuning a ``base`` is added, a dense matrix that is not trained: ``y = x (base +
    U V + S)^T + bias``.

    Args:
        in_features: ``n``.
        out_features: ``m``.
        rank: ``r``, from 0 to ``min(m, n)``; with 0 the weight is sparse alone.
        density: the share of entries of ``S``, 0 to 1.
        family: of the support, see :class:`structmat.SparsePattern`: ``"uniform"``, ``"columns"``,
            ``"vector16"`` or ``"block16"``.
        bias: add a learned bias.
        init: ``"sltrain"`` or ``"lost"``, see :meth:`reset_parameters`.
        seed: of the support; ``None`` lets torch's generator draw one, kept as ``pattern.seed``, so
            that layers differ and ``torch.manual_seed`` decides.
        device, dtype: of the parameters.
        base: ``(m, n)``, on that device and of that dtype; beside float32 also bfloat16 or float16.
            Taken as it is, not copied. It stays frozen: once it requires a gradient, as after
            ``model.requires_grad_()``, the layer raises.

    Attributes:
        U: ``(m, r)``.
        V: ``(r, n)``.
        values: ``(nnz,)``, the entries of ``S`` in the order of the pattern.
        bias: ``(m,)`` or ``None``.
        base: ``(m, n)``, a parameter without gradient, or ``None``.
        pattern: the :class:`structmat.SparsePattern` of ``S``. Its index lies in the buffers
            ``starts`` and ``columns`` (as bytes, which all means of communication carry), so that
            ``state_dict`` is complete and loading takes the support with the values.
        weight: ``U V + S (m, n)``, and ``base``, computed when it is used.

    Raises:
        TypeError: a size is no integer, dtype none of float32, float64, bfloat16 and float16, or
            base is no tensor of a dtype that goes with it.
        ValueError: a size is below one, ``rank`` above ``min(m, n)``, ``density`` out of range, an
            option is unknown, base has another shape or device, or ``init`` is ``"lost"`` with one.

    Cost: ``2 (r (m + n) + nnz)`` FLOPs a row, see :func:`structmat.ops.sparse_low_rank_linear`.

    Sources: Han et al., SLTrain: a sparse plus low-rank approach for parameter and memory efficient
    pretraining, 2024; LOST: Low-rank and Sparse Pre-training for Large Language Models, 2025.

    Example:
        >>> import torch, structmat as sm
        >>> layer = sm.nn.SparseLowRankLinear(64, 32, rank=4, density=0.1)
        >>> layer(torch.randn(5, 64)).shape
        torch.Size([5, 32])
        >>> dense = torch.nn.Linear(64, 32)
        >>> all_of_it = sm.nn.SparseLowRankLinear.from_linear(dense, 4, 1.0)
        >>> torch.allclose(all_of_it.to_linear().weight, dense.weight, atol=1e-5)
        True
    """

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    base: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        density: float,
        *,
        family: str = "uniform",
        bias: bool = True,
        init: str = "sltrain",
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        base: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_sizes("SparseLowRankLinear", in_features, out_features, None)
        _check_rank("SparseLowRankLinear", rank, out_features, in_features)
        check_dtype("SparseLowRankLinear", dtype)
        if init not in _INITS:
            raise ValueError(
                f"SparseLowRankLinear: init is {init!r}, wanted one of {', '.join(_INITS)}"
            )
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        pattern = SparsePattern.random(
            out_features, in_features, density, family=family, seed=seed, device=device
        )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.density, self.family, self.init = density, family, init
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.U = nn.Parameter(torch.empty(out_features, rank, **like))
        self.V = nn.Parameter(torch.empty(rank, in_features, **like))
        self.values = nn.Parameter(torch.empty(pattern.nnz, **like))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, **like))
        else:
            self.register_parameter("bias", None)
        self.register_parameter("base", None)
        if base is not None:
            shape = out_features, in_features
            check_base("SparseLowRankLinear", base, "U", self.U, shape)
            if init != "sltrain":
                raise ValueError(
                    f"SparseLowRankLinear: init {init!r} splits a drawn matrix; with a base it is "
                    "'sltrain'"
                )
            self.base = nn.Parameter(base.detach(), requires_grad=False)
        self._take(pattern)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters, as ``init`` says; the bias is zero.

        ``"sltrain"``: ``V`` and ``values`` by ``U(-1/sqrt(n), 1/sqrt(n))``, ``U`` zero, so that
        training begins from the sparse matrix alone. The support stays. With a base ``values`` are
        zero, too: it begins from the base.

        ``"lost"``: a matrix by ``N(0, 1/n)``, split in one step: ``U V`` is the head of its SVD,
        and ``S`` the part of the residual that has the largest norm, with the published
        ``family="columns"`` its largest columns. The support changes with it. What neither
        takes is lost, so that entries of the weight vary less than by ``1/sqrt(n)``. Costs one
        truncated SVD and a few dense matrices, the residual in double precision, while it runs.
        """
        scale = 1 / math.sqrt(self.in_features)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.init == "sltrain":
            nn.init.uniform_(self.V, -scale, scale)
            nn.init.uniform_(self.values, -scale, scale)
            nn.init.zeros_(self.U)
            if self.base is not None:
                nn.init.zeros_(self.values)
        elif not self.V.is_meta:
            W = torch.empty(self.out_features, self.in_features, device=self.V.device)
            nn.init.normal_(W, std=scale)
            U, V, pattern, values = _decompose(W, self.rank, self.density, self.family)
            with torch.no_grad():
                self.U.copy_(U)
                self.V.copy_(V)
                self.values.data = values.to(self.values)
            self._take(pattern)

    @property
    def weight(self) -> Tensor:
        """``W = U V + S``, or ``base + U V + S``, for code that reads the weight of a dense layer.
        Not a parameter.

        Its dtype, device and shape cost nothing; any other use computes the matrix, ``2 m n r``
        FLOPs each time and ``m n`` numbers of memory, and gradients flow to ``U``, ``V`` and
        ``values``.

        Raises:
            RuntimeError: it is written to, which would change none of them. ``weight.data`` and
                ``weight.detach()`` are copies, and can be.
        """
        shape = self.out_features, self.in_features
        parts: dict[str, Tensor] = {"U": self.U, "V": self.V, "values": self.values}
        if self.base is not None:
            parts["base"] = self.base
        return product("SparseLowRankLinear", shape, parts, self._dense)

    def _dense(self, U: Tensor, V: Tensor, values: Tensor, base: Tensor | None = None) -> Tensor:
        W = U @ V + self.pattern.scatter(values)
        return W if base is None else base + W

    def forward(self, x: Tensor) -> Tensor:
        return ops.sparse_low_rank_linear(
            x, self.U, self.V, self.pattern, self.values, self.bias, base=self.base
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        density: float,
        *,
        family: str = "uniform",
        inputs: Tensor | None = None,
    ) -> "SparseLowRankLinear":
        """A layer near a given ``nn.Linear``, of its dtype and device.

        Its weight is that of :func:`structmat.sparse_low_rank.decompose`, which tells what it
        minimises and costs.

        Args:
            linear: the dense layer, left as it is.
            rank, density, family: as those of the constructor.
            inputs: second moments of the layer's inputs, ``E[x x^T] (n, n)`` or its diagonal
                ``(n,)``: minimises the expected error of the output instead of the weight's.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or ``rank`` no integer.
            ValueError: bad rank, density, family or inputs, NaN or Inf in the weight.
            torch.linalg.LinAlgError: NaN or Inf in inputs.
        """
        from ..sparse_low_rank import decompose

        op = "SparseLowRankLinear.from_linear"
        W = finite_weight(op, linear)
        _check_rank(op, rank, *W.shape)
        layer = cls._of(decompose(W, rank, density, family=family, inputs=inputs), density)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone())
        return layer.train(linear.training)

    @classmethod
    def beside(
        cls,
        linear: nn.Linear,
        rank: int,
        density: float,
        *,
        family: str = "uniform",
        seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SparseLowRankLinear":
        """A layer that fine-tunes an ``nn.Linear``: ``W = base + U V + S`` with its weight frozen.

        It computes what the given one does until it is trained. ``base`` is that layer's weight,
        not a copy; the bias, if it has one, is copied and is trained, too.

        Args:
            linear: the dense layer, left as it is.
            rank, density, family, seed: as those of the constructor.
            dtype: of what is trained, the weight's by default. With float32 a weight in bfloat16 or
                float16 stays so; the layer then takes float32, or whatever ``torch.autocast`` says.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear``, or ``dtype`` is none that goes with its.
            ValueError: bad rank, density or family, NaN or Inf in the weight.

        Example:
            >>> import torch, structmat as sm
            >>> dense = torch.nn.Linear(64, 32).bfloat16()
            >>> layer = sm.nn.SparseLowRankLinear.beside(dense, 4, 0.02, dtype=torch.float32)
            >>> layer.base.dtype, [name for name, p in layer.named_parameters() if p.requires_grad]
            (torch.bfloat16, ['U', 'V', 'values', 'bias'])
        """
        base = finite_weight("SparseLowRankLinear.beside", linear)
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank,
            density,
            family=family,
            bias=linear.bias is not None,
            seed=seed,
            device=base.device,
            dtype=base.dtype if dtype is None else dtype,
            base=base,
        )
        if layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @classmethod
    def _of(cls, found: "SparseLowRank", density: float) -> "SparseLowRankLinear":
        """A layer, without bias, that takes these very tensors."""
        m, n = found.pattern.shape
        layer = cls(n, m, found.U.shape[1], 0.0, bias=False, seed=0, device="meta")  # draws nothing
        layer.density, layer.family = density, found.pattern.family
        layer.U, layer.V = nn.Parameter(found.U), nn.Parameter(found.V)
        layer.values = nn.Parameter(found.values)
        layer._take(found.pattern)
        return layer

    def to_linear(self) -> nn.Linear:
        """The dense layer with this ``weight``, of the dtype of ``U`` and its device."""
        parts = self.U, self.V, self.values, *([] if self.base is None else [self.base])
        return dense_like(self, self._dense(*(a.detach().double() for a in parts)), self.U)

    @torch.no_grad()
    def reselect(self, scores: Tensor) -> Reselection:
        """Moves the support to the entries with the largest scores that the family allows.

        Values of entries that stay are kept, new ones are zero, and the gradient is dropped.
        ``values`` remains the same parameter, so that optimizers keep it;
        :meth:`Reselection.carry_optimizer_state` moves what they know of it.

        Args:
            scores: ``(m, n)``, not below zero, such as the magnitude of a gradient or of the
                weight; :meth:`structmat.SparsePattern.from_scores` tells how they are used.

        Returns:
            Which entries stayed.

        Raises:
            TypeError: no floating tensor.
            ValueError: another shape or device, NaN, Inf or negative numbers.

        Cost: a few passes over the scores, and the memory of
        :meth:`structmat.SparsePattern.from_scores`; everything else is ``O(nnz log nnz)``.

        Example:
            >>> import torch, structmat as sm
            >>> layer = sm.nn.SparseLowRankLinear(64, 32, rank=4, density=0.1)
            >>> optimizer = torch.optim.Adam(layer.parameters())
            >>> moved = layer.reselect(torch.rand(32, 64))
            >>> moved.carry_optimizer_state(optimizer)
        """
        op = "SparseLowRankLinear.reselect"
        shape = self.out_features, self.in_features
        if isinstance(scores, Tensor) and tuple(scores.shape) != shape:
            raise ValueError(f"{op}: scores is {tuple(scores.shape)}, wanted {shape}")
        if isinstance(scores, Tensor) and scores.device != self.values.device:
            raise ValueError(f"{op}: scores is on {scores.device}, wanted {self.values.device}")
        pattern = SparsePattern.from_scores(scores, self.density, family=self.family)
        moved = Reselection.between(self.pattern, pattern, self.values)
        self.values.data = moved.carry(self.values.data)
        self.values.grad = None
        self._take(pattern)
        return moved

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"nnz={self.values.numel()}, family={self.family!r}, bias={self.bias is not None}"
            + ("" if self.base is None else f", base={self.base.dtype}")
        )


def _check_rank(op: str, rank: int, m: int, n: int) -> None:
    check_integer("rank", rank, op)
    if not 0 <= rank <= min(m, n):
        raise ValueError(
            f"{op}: rank must be from 0 to {min(m, n)} for {n} in, {m} out, got {rank}"
        )


def _decompose(
    W: Tensor, rank: int, density: float, family: str
) -> tuple[Tensor, Tensor, SparsePattern, Tensor]:
    """``U``, ``V``, the support and its values: one truncated SVD, and the largest residual."""
    from ..compress import factor

    factors = factor.svd(W)
    U, V = factors.U[:, :rank], factors.V[:rank]
    residual = W.double() - U @ V
    pattern = SparsePattern.from_scores(residual.square(), density, family=family)
    return U, V, pattern, pattern.gather(residual)
