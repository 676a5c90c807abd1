# SPDX-License-Identifier: Apache-2.0
"""The test tools themselves: the tolerance accepts plain torch and refuses what is wrong."""

import pytest
import reference
import torch
from reference import LAYOUTS, LINEAR_SIZES, assert_close, make


@pytest.mark.parametrize("size", LINEAR_SIZES)
def test_plain_composition_is_accepted(size: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, m, n, r = size
    # Contiguous: torch's bfloat16 product of slices can read, and sum, NaN beyond them.
    shapes = [(tokens, n), (m, r), (r, n), (m,)]
    x, U, V, b = (make(*shape, dtype=dtype, layout="contiguous") for shape in shapes)
    y = (x @ V.T) @ U.T + b
    assert_close(y, reference.low_rank_linear(x, U, V, b), dtype, terms=n + r)


def test_wrong_results_are_refused(dtype: torch.dtype) -> None:
    want = torch.randn(40, 50, dtype=torch.float64)
    right = want.to(dtype)
    assert_close(right, want, dtype)
    for wrong in (right + 0.1, right[:, 1:], right.double() if dtype != torch.float64 else None):
        if wrong is not None:
            with pytest.raises(AssertionError):
                assert_close(wrong, want, dtype)
    nan = right.clone()
    nan[3, 4] = torch.nan
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(nan, want, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_numbers(layout: str) -> None:
    torch.manual_seed(1)
    contiguous = make(5, 7, layout="contiguous")
    torch.manual_seed(1)
    other = make(5, 7, layout=layout)
    assert torch.equal(contiguous, other)
    assert other.is_contiguous() == (layout == "contiguous")


def test_gradients() -> None:
    x, U, V, b = make(3, 5), make(4, 2), make(2, 5), make(4)
    dy = make(3, 4)
    y, (dx, dU, dV, db) = reference.gradients(reference.low_rank_linear, (x, U, V, b), dy)
    dy, x, U, V = dy.double(), x.double(), U.double(), V.double()
    torch.testing.assert_close(y, x @ (U @ V).T + b.double())
    torch.testing.assert_close(dx, dy @ U @ V)
    torch.testing.assert_close(dU, dy.T @ x @ V.T)
    torch.testing.assert_close(dV, U.T @ dy.T @ x)
    torch.testing.assert_close(db, dy.sum(0))
    _, found = reference.gradients(reference.low_rank_linear, (x, U, V, None), dy)
    assert found[3] is None
