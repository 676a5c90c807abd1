# SPDX-License-Identifier: Apache-2.0
"""Complex matrices have no decomposition here, and every function says so."""

import pytest
import torch

import structmat as sm

A = torch.ones(8, 5, dtype=torch.complex64)


class Operator:
    shape, dtype, device = A.shape, A.dtype, A.device

    def matmat(self, X):
        return A @ X

    def rmatmat(self, Y):
        return A.mH @ Y


CALLS = {
    "randomized_svd": lambda L: L.randomized_svd(A, 2),
    "rtol": lambda L: L.randomized_svd(A, rtol=0.1),
    "list": lambda L: L.randomized_svd([A], 2),
    "CSR": lambda L: L.randomized_svd(A.to_sparse_csr(), 2),
    "operator": lambda L: L.randomized_svd(Operator(), 2),
    "StreamingSVD": lambda L: L.StreamingSVD(5, 2, dtype=A.dtype),
    "update": lambda L: L.StreamingSVD(5, 2).update(A),
    "svd_out_of_core": lambda L: L.svd_out_of_core(lambda: iter([A]), 2),
    "orthonormalize": lambda L: L.orthonormalize(A),
    "gram_matmul": lambda L: L.gram_matmul(A, A[:2].mT),
    "gram_matmul X": lambda L: L.gram_matmul(A.real, A[:2].mT),
    "range_step": lambda L: L.range_step(A, A[:, :2]),
    "range_step Q": lambda L: L.range_step(A.real, A[:5, :2]),
    "svd_tail": lambda L: L.svd_tail(A, 2),
    "gaussian": lambda L: L.gaussian(2, 2, dtype=A.dtype),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("name", CALLS)
def test_complex_is_refused(name):
    with pytest.raises(TypeError, match=r"complex64.*wanted|got torch.complex64"):
        CALLS[name](sm.linalg)
