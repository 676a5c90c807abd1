# SPDX-License-Identifier: Apache-2.0
"""How far ``Q Q^T A`` is from A, from the products that found Q: ``||(I - Q Q^T) A||_F^2``.

Where the norm of A is known this is ``||A||_F^2 - ||Q^T A||_F^2``, which rounding hides once it
falls under some units of eps. There, and where the norm is not known, it comes from s = 8 Gaussian
columns G that had no part in Q: the mean of ``||(I - Q Q^T) A g||^2``, which does not cancel.
"""

from typing import NamedTuple

from torch import Tensor

PROBES = 8
_QUANTILE = 3.09  # standard deviations: one bound in a thousand is too low


class Tail(NamedTuple):
    """Squares, in units of ``||A||_F^2``."""

    estimate: float
    bound: float


def tail(captured: float, total: float | None, probed: Tensor | None, eps: float) -> Tail:
    """From ``||Q^T A||_F^2``, ``||A||_F^2`` if known, and the Gram matrix ``(s, s)`` of
    ``(I - Q Q^T) A G``; probed None: Q is complete."""
    rounding = (8 * eps) ** 2
    if captured == 0 and (total or 0) == 0 and (probed is None or not probed.any()):
        return Tail(0.0, 0.0)
    if probed is None:
        return Tail(0.0, rounding)
    if total:
        # In the products, and from a basis orthonormal to some eps, energies err by a few eps.
        missed = 1 - captured / total
        if missed >= 64 * eps:
            return Tail(missed, missed + 16 * eps)
    probed = probed.double().cpu()
    s = len(probed)
    left = float(probed.trace()) / s
    known = total or captured + left
    if left == 0:
        return Tail(0.0, rounding)
    # A sum of chi-squares: s times as many degrees of freedom as the rest has singular values that
    # count, (sum sigma^2)^2 / sum sigma^4, whose denominator the products of two probes estimate.
    pairs = s * (s - 1)
    fourth = float(probed.square().sum() - probed.diagonal().square().sum()) / pairs
    spread = max(1.0, left**2 / max(fourth, 1e-300 + left**2 * 1e-12) / 2)
    freedom = s * spread
    slack = 2 / (9 * freedom)  # Wilson and Hilferty's quantile of chi-square
    low = (1 - slack - _QUANTILE * slack**0.5) ** 3
    bound = left / low
    return Tail(left / known, bound / (total or captured + bound) + rounding)
