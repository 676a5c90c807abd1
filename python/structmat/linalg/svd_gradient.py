# SPDX-License-Identifier: Apache-2.0
"""Gradients of the truncated SVD, the part outside the leading singular vectors included.

``A = U S V^T + E`` with ``E = P A Q``, ``P = I - U U^T``, ``Q = I - V V^T``. For ``dA`` and
``M = U^T dA V`` the differentials are ``dS = diag(M)``, ``dU = U N_u + X``, ``dV = V N_v + Y``:

    ``(N_u + N_v)_ij = (M + M^T)_ij / (s_j - s_i)``
    ``(N_u - N_v)_ij = (M - M^T)_ij / (s_i + s_j)``
    ``s_i x_i - E y_i = P dA v_i``,   ``s_i y_i - E^T x_i = Q dA^T u_i``

``N_u`` and ``N_v`` are skew. The sum has what grows without bound where ``s_i`` and ``s_j`` are
close; it meets a zero where a loss does not depend on how the two are split. The last system is
symmetric: the adjoint solves it with the gradients of U and V on the right. It is positive definite
where ``s_k > s_{k+1}``. All of it with ``E / s_1``, so that no square overflows.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

_BLOCKS = 3  # of the Krylov space that all columns share; its Ritz vectors are then deflated
_BASIS = 32  # columns this has at least
_WIDTH = 8  # columns of a block at least: they cost little more than one, which reads A as often
_ITERATIONS = 200
_CLOSE = 8  # eps s_1: singular values no further apart count as equal


class _Residual:
    """``E / scale`` and its transpose, by products with ``A (m, n)``, never copied whole."""

    def __init__(self, A: Tensor, U: Tensor, V: Tensor, scale: Tensor) -> None:
        self.A, self.U, self.V, self.scale = A, U, V, scale

    def times(self, Y: Tensor) -> Tensor:
        return _outside(_product(self.A, Y) / self.scale, self.U)

    def transposed_times(self, X: Tensor) -> Tensor:
        return _outside(_product(self.A.T, X) / self.scale, self.V)


def _product(A: Tensor, X: Tensor) -> Tensor:
    if A.dtype == X.dtype and min(A.stride()) == 1:
        return A @ X
    rows = max(1, (1 << 22) // A.shape[1])  # what torch would copy, 4 million numbers at a time
    return torch.cat([part.to(X.dtype) @ X for part in A.split(rows)])


def _outside(X: Tensor, basis: Tensor) -> Tensor:
    return X - basis @ (basis.T @ X)


def _inverse(difference: Tensor) -> Tensor:
    """``1 / difference`` of numbers of size 1, 0 where it is rounding."""
    close = difference.abs() <= _CLOSE * torch.finfo(difference.dtype).eps
    return torch.where(close, 0, 1 / difference)


def gradient(
    A: Tensor,
    U: Tensor,
    S: Tensor,
    V: Tensor,
    dU: Tensor | None,
    dS: Tensor | None,
    dV: Tensor | None,
    center: bool,
) -> Tensor:
    """``dA (m, n)`` for one matrix. With ``center`` the decomposition is that of ``A - mean``."""
    left = U if dS is None else U * dS  # dA = left V^T + U right^T
    if dU is None and dV is None:
        return _of_rows(left @ V.T if dS is not None else torch.zeros_like(left @ V.T), center)
    if A.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "randomized_svd: the gradient of U and Vh waits for the device, which a CUDA graph "
            "cannot; that of S does not"
        )
    scale = torch.where(S[0] > 0, S[0], 1)
    s = S / scale
    zero = s.new_zeros(len(s), len(s))
    skew_u, skew_v = (
        zero if given is None else _skew(basis.T @ given) for basis, given in ((U, dU), (V, dV))
    )
    inner = (skew_u + skew_v) * _inverse(s - s[:, None])
    inner += (skew_u - skew_v) * _inverse(s + s[:, None])
    left = (left if dS is not None else 0) + U @ (inner / scale)
    E = _Residual(A, _with_ones(U) if center else U, V, scale)
    X, Y = outer(
        E,
        s,
        U.new_zeros(U.shape) if dU is None else _outside(dU, E.U),
        V.new_zeros(V.shape) if dV is None else _outside(dV, E.V),
    )
    return _of_rows(torch.cat([left + X / scale, U], 1) @ torch.cat([V, Y / scale], 1).T, center)


def _of_rows(dA: Tensor, center: bool) -> Tensor:
    """From the gradient of ``A - mean`` that of ``A``."""
    return dA - dA.mean(0) if center else dA


def _with_ones(U: Tensor) -> Tensor:
    """U and ones: ``A - mean`` is ``A`` with them projected off. Ones are normal to U but for
    columns of singular values 0, which may hold them: there U keeps what is normal to them."""
    ones = U.new_full((len(U), 1), len(U) ** -0.5)
    normal = U - ones @ (ones.T @ U)
    size = normal.norm(dim=0)
    return torch.cat([torch.where(size > 0.5, normal / size.clamp(min=0.5), 0), ones], 1)


def _skew(M: Tensor) -> Tensor:
    return (M - M.T) / 2


def outer(E: _Residual, s: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``s_i x_i - E y_i = left_i``, ``s_i y_i - E^T x_i = right_i``; 0 for ``s_i = 0``.

    One of the two is eliminated, the longer: ``(s_i^2 - E^T E) y_i = s_i right_i + E^T left_i``.
    """
    if len(left) < len(right):
        Y, X = outer(_Residual(E.A.T, E.V, E.U, E.scale), s, right, left)
        return X, Y
    eps = torch.finfo(s.dtype).eps
    live = s > max(len(left), len(right)) * eps
    size = torch.maximum(left.abs().amax(0), right.abs().amax(0))
    size = torch.where(size > 0, size, 1)  # products of A with numbers of size 1 do not overflow
    left, right = (torch.where(live, t / size, 0) for t in (left, right))
    s = torch.where(live, s, 1)
    target = s * right + E.transposed_times(left)
    # The result is no more accurate than the vectors, A v_i = s_i u_i.
    k = len(s)
    image = _outside(_product(E.A, E.V[:, :k]) / E.scale, E.U[:, k:])  # less the mean
    inexact = (image - E.U[:, :k] * s).norm(dim=0) / s
    accuracy = (inexact / 10).clamp(4 * eps, 0.01)
    noise = 8 * eps * (s * right.norm(dim=0) + left.norm(dim=0))
    Y = torch.zeros_like(target)
    chosen = (target.norm(dim=0) > noise) | target.norm(dim=0).isnan()
    if bool(chosen.any()):
        Y[:, chosen] = _solve(E, s[chosen], target[:, chosen], accuracy[chosen], inexact[chosen])
    return size * ((left + E.times(Y)) / s), size * Y


def _solve(E: _Residual, s: Tensor, target: Tensor, accuracy: Tensor, inexact: Tensor) -> Tensor:
    """``y_i`` with ``M_i y_i = target_i``, ``M_i = s_i^2 - E^T E``.

    Galerkin's solution in a block Krylov space, which is exact where that is the whole space, and
    for the rest the conjugate gradient method with this space deflated (Nicolaides, SIAM J. Numer.
    Anal. 24, 1987): the values next to ``s_k`` are in it, and those decide the rate.
    """
    W, BW, theta = _ritz(E, target)  # BW = E^T E W
    apart = s - theta[:, None]
    same = apart.abs() <= inexact * s  # the vectors do not tell the two apart
    inverse = torch.where(same, 0, _inverse(apart)) / (s + theta[:, None])  # of W^T M_i W, diagonal
    inside = W.T @ target
    bound = accuracy * target.norm(dim=0)
    missing = (inside * (inverse == 0)).norm(dim=0)
    start = W @ (inside * inverse)
    if BW is None:
        _report(missing > bound)
        return start

    def deflate(v: Tensor, s: Tensor, inverse: Tensor) -> Tensor:
        """v - M W (W^T M W)^-1 W^T v, nothing of which is in W's span."""
        t = W.T @ v
        v = v - W @ torch.where(inverse == 0, t, s.square() * inverse * t) + BW @ (inverse * t)
        return _outside(v, W)

    Z, left = torch.zeros_like(target), bound + missing
    columns = torch.arange(len(s), device=s.device)
    residual = direction = deflate(target, s, inverse)
    size, stopped = residual.norm(dim=0), torch.zeros_like(s, dtype=torch.bool)
    state = [residual, direction, torch.zeros_like(residual), size, bound, stopped, s, inverse]
    for step in range(_ITERATIONS):
        if step % 4 == 0:
            keep = ((state[3] > state[4]) & ~state[5]).nonzero()[:, 0]
            if len(keep) < len(columns):
                Z[:, columns], left[columns] = state[2], state[3]
                columns, state = columns[keep], [t[..., keep] for t in state]
            if not len(keep):
                break
        residual, direction, z, size, bound, stopped, s_, inverse_ = state
        image = E.transposed_times(E.times(direction))
        image = deflate(s_.square() * direction - image, s_, inverse_)
        curvature = (direction * image).sum(0)
        stopped = stopped | (curvature <= 1e-6 * s_.square() * direction.square().sum(0))
        active = (size > bound) & ~stopped
        length = torch.where(active, size.square() / curvature, 0)
        residual = residual - length * image
        after = torch.where(active, residual.norm(dim=0), size)
        turn = torch.where(active, (after / size).square(), 0)
        state = [residual, residual + turn * direction, z + length * direction, after]
        state += [bound, stopped, s_, inverse_]
    Z[:, columns], left[columns] = state[2], state[3]
    _report(torch.maximum(left, missing) > accuracy * target.norm(dim=0))
    inside = s.square() * (W.T @ Z) - BW.T @ Z
    return start + Z - W @ (inverse * inside)


def _report(unsolved: Tensor) -> None:
    if bool(unsolved.any()):
        warnings.warn(
            "randomized_svd: the gradient of U and Vh is not determined: a singular value kept and "
            "one left out are too close, or the vectors too inexact, which more sweeps help",
            stacklevel=2,
        )


def _ritz(E: _Residual, start: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ritz vectors ``W`` of ``E^T E``, ``E^T E W`` and the roots of the Ritz values.

    In the block Krylov space of `start`; where that is as large as all that is outside V, of that,
    and the second is None.
    """
    n, known = E.V.shape
    width = max(start.shape[1], _WIDTH)
    blocks = max(_BLOCKS, -(-_BASIS // width))
    if width * blocks >= n - known:
        W = torch.linalg.qr(E.V, mode="complete").Q[:, known:]
        EW = E.times(W)
        theta, G = _eigh(EW.T @ EW)
        return W @ G, None, theta
    if start.shape[1] < width:
        more = torch.ops.structmat.gaussian(start, n, width - start.shape[1], 0, 0)
        start = torch.cat([start, more], 1)
    basis = E.V.new_empty(n, known + blocks * width)
    image = E.V.new_empty(n, blocks * width)
    basis[:, :known] = E.V
    for block in range(blocks):
        first, last = block * width, (block + 1) * width
        for _ in range(3):  # columns that bring nothing new are noise at first, of A's span too
            start = torch.linalg.qr(_outside(start, basis[:, : known + first])).Q
        basis[:, known + first : known + last] = start
        image[:, first:last] = start = E.transposed_times(E.times(start))
    W = basis[:, known:]
    theta, G = _eigh(W.T @ image)
    return W @ G, image @ G, theta


def _eigh(T: Tensor) -> tuple[Tensor, Tensor]:
    finite = torch.where(T.isfinite(), T, 0).double()  # NaN reaches the result by other ways
    values, G = torch.linalg.eigh((finite + finite.T) / 2)
    return values.clamp_min(0).sqrt().to(T.dtype), G.to(T.dtype)


@torch.library.impl("structmat::randomized_svd_backward", "CompositeExplicitAutograd")
def _(
    A: Tensor,
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    dU: Tensor | None,
    dS: Tensor | None,
    dVh: Tensor | None,
    center: bool,
) -> Tensor:
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        if A.dim() == 2:
            dV = None if dVh is None else dVh.T
            return gradient(A, U, S, Vh.T, dU, dS, dV, center).to(A.dtype)
        dA = torch.empty(A.shape, dtype=A.dtype, device=A.device)
        for index in torch.cartesian_prod(*map(torch.arange, A.shape[:-2])).view(-1, A.dim() - 2):
            one = tuple(index.tolist())
            parts = (None if t is None else t[one] for t in (A, U, S, Vh, dU, dS, dVh))
            dA[one] = torch.ops.structmat.randomized_svd_backward(*parts, center)
        return dA


@torch.library.register_fake("structmat::randomized_svd_backward")
def _(
    A: Tensor,
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    dU: Tensor | None,
    dS: Tensor | None,
    dVh: Tensor | None,
    center: bool,
) -> Tensor:
    return torch.empty(A.shape, dtype=A.dtype, device=A.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], *output[:3])
    ctx.arguments, ctx.center = len(inputs), inputs[5]


def _backward(
    ctx: Any, dU: Tensor | None, dS: Tensor | None, dVh: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    A, U, S, Vh = ctx.saved_tensors
    dA = torch.ops.structmat.randomized_svd_backward(A, U, S, Vh, dU, dS, dVh, ctx.center)
    return dA, *[None] * (ctx.arguments - 1)


def _save_list(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.count = len(inputs[0])
    ctx.save_for_backward(*inputs[0], *(t for factor in output[:3] for t in factor))
    ctx.arguments, ctx.center = len(inputs), inputs[5]


def _backward_list(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    saved, count = ctx.saved_tensors, ctx.count
    A, factors = saved[:count], [saved[i * count : (i + 1) * count] for i in (1, 2, 3)]
    dA = [
        torch.ops.structmat.randomized_svd_backward(*one, ctx.center) if a.requires_grad else None
        for a, one in zip(A, zip(A, *factors, *grads[:3], strict=True), strict=True)
    ]
    return dA, *[None] * (ctx.arguments - 1)


def _no_second(ctx: Any, _: Tensor) -> None:
    raise RuntimeError("randomized_svd: there are no second derivatives")


torch.library.register_autograd("structmat::randomized_svd", _backward, setup_context=_save)
torch.library.register_autograd(
    "structmat::randomized_svd_to_tolerance", _backward, setup_context=_save
)
torch.library.register_autograd("structmat::randomized_svd_backward", _no_second)
torch.library.register_autograd(
    "structmat::randomized_svd_list", _backward_list, setup_context=_save_list
)
