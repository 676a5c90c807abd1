# SPDX-License-Identifier: Apache-2.0
"""One rank of test_distributed: python distributed_worker.py RANK RANKS FOLDER

Decomposes its rows of matrices that all ranks know, and writes what it got to FOLDER/RANK.pt.
"""

import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import structmat as sm
from structmat.linalg import matrix_free, out_of_core

warnings.filterwarnings("ignore", message="Sparse")


class Operator:
    def __init__(self, A):
        self.A, self.shape, self.dtype, self.device = A, A.shape, A.dtype, A.device

    def matmat(self, X):
        return self.A @ X

    def rmatmat(self, Y):
        return self.A.mT @ Y


def matrices():
    """Tall, wide and of low rank, centred or not."""
    torch.manual_seed(0)
    for name, m, n in (("tall", 121, 40), ("wide", 41, 90), ("deficient", 83, 40)):
        A = torch.randn(m, n, dtype=torch.float64) / torch.arange(1, n + 1)
        if name == "deficient":
            A[:, 5:] = A[:, :1] * 0.5
            A[20:] = 0
        yield name, A + 0.1


def shares(m, ranks):
    """Unequal shares; of four ranks one has a single row, one none."""
    return {1: [m], 2: [m - 7, 7], 4: [m - 30, 0, 29, 1]}[ranks]


def decompose(A, rank=None, rtol=None, sweeps=None, center=False, group=None):
    """randomized_svd by the code of shards, also where there is no group."""
    return matrix_free.randomized_svd(A, rank, rtol, None, sweeps, center, 0, group)


def calls(group=None, mine=lambda A: A):
    """All results by name; `mine` cuts out the rows of this rank."""
    found = {}
    for name, A in matrices():
        part = mine(A)
        for make, options in (
            (torch.clone, {"rank": 5}),
            (torch.clone, {"rtol": 0.1, "center": True}),
            (torch.Tensor.half, {"rank": 40}),
            (torch.Tensor.to_sparse_csr, {"rank": 4, "sweeps": 2, "center": True}),
            (Operator, {"rtol": 0.1}),
        ):
            result = decompose(make(part), **options, group=group)
            found[f"{name} {make.__name__} {options}"] = (*result, result.info.error)
        for center in (False, True):
            blocks = [part[:3], part[3:]] if len(part) else [part]
            result = sm.linalg.svd_out_of_core(
                lambda blocks=blocks: iter(blocks), 5, center=center, group=group
            )
            found[f"{name} blocks {center}"] = (*result, result.info.error)
    return found


def failure(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD

    def mine(A):
        return A.split(shares(len(A), ranks))[rank]

    found = calls(group, mine)

    A = dict(matrices())["tall"]
    mesh = init_device_mesh("cpu", (ranks,))
    sharded = DTensor.from_local(mine(A), mesh, [Shard(0)], shape=A.shape, stride=A.stride())
    U, S, Vh = result = sm.linalg.randomized_svd(sharded, 5)
    assert U.placements == (Shard(0),)
    assert U.shape == (len(A), 5)
    in_list = sm.linalg.randomized_svd([A, sharded], 5)[1]
    assert torch.equal(in_list.U.to_local(), U.to_local())
    found["dtensor"] = (U.to_local(), S.to_local(), Vh.to_local(), result.info.error)

    streams = [sm.linalg.StreamingSVD(n, 4, center=True, dtype=A.dtype) for n in (40, 200)]
    for stream in streams:
        wide = torch.cat([A] * (stream.n_features // 40), 1)
        sm.linalg.all_merge(stream.update(mine(wide)), group)
    found["streams"] = [(s.rows_seen, s.mean, *s.result()[1:]) for s in streams]

    def broken():
        yield A
        if rank == 0:
            raise OSError("the disk is gone")

    svd, ooc = sm.linalg.randomized_svd, sm.linalg.svd_out_of_core
    last = rank == ranks - 1
    found["errors"] = [
        failure(lambda: svd(A, 4 + last, group=group)),
        failure(lambda: svd(A[:, : 40 - last], 4, group=group)),
        failure(lambda: svd(A, 3, center=last, group=group)),
        failure(lambda: svd([A] * (1 + last), 3, group=group)),
        failure(lambda: svd([sharded] * (2 - last), 3)),
        failure(lambda: svd(A * (torch.nan if last else 1), 4, group=group)),
        failure(lambda: ooc(broken, 4, group=group)),
        failure(lambda: ooc(lambda: iter([A]), 4 + last, group=group)),
        failure(lambda: sm.linalg.all_merge(sm.linalg.StreamingSVD(40, 4 + last), group)),
    ]

    class Broken(Operator):
        def matmat(self, X):
            raise OSError("the disk is gone")

    class BrokenTransposed(Operator):
        def rmatmat(self, Y):
            raise OSError("the disk is gone")

    csr = A.to_sparse_csr()
    col = csr.col_indices().clone()
    col[-1] = 40 + 1000 * last
    invalid = torch.sparse_csr_tensor(
        csr.crow_indices(), col if last else csr.col_indices(), csr.values(), A.shape,
        check_invariants=False,
    )  # fmt: skip
    found["errors of one"] = [
        failure(lambda: svd(A, 0 if last else 4, group=group)),
        failure(lambda: svd(A[0] if last else A, 4, group=group)),
        failure(lambda: svd(sharded, 0 if last else 4)),
        failure(lambda: svd([A, A], [4] if last else [4, 4], group=group)),
        failure(lambda: svd([sharded, sharded], [4] if last else [4, 4])),
        failure(lambda: svd(invalid, 4, group=group)),
        failure(lambda: svd((Broken if last else Operator)(A), 4, group=group)),
        failure(lambda: svd((BrokenTransposed if last else Operator)(A), 4, group=group)),
        failure(lambda: ooc(lambda: iter([A]), 0 if last else 4, group=group)),
        failure(lambda: ooc(lambda: iter([A]), 4, device="cuda:99" if last else None, group=group)),
        failure(lambda: svd("A.npy" if last else A, 4, group=group)),
        failure(lambda: sm.linalg.all_merge(None if last else streams[0], group)),
    ]
    merge = sm.linalg.StreamingSVD.merge
    if rank == ranks - 2:  # the last that takes in another

        def broken_merge(*_):
            raise OSError("no memory")

        sm.linalg.StreamingSVD.merge = broken_merge
    found["merge"] = failure(lambda: sm.linalg.all_merge(streams[0]))
    sm.linalg.StreamingSVD.merge = merge
    qr = torch.linalg.qr
    if last:  # as where memory ends

        def broken_qr(*_):
            raise OSError("no memory")

        torch.linalg.qr = broken_qr
    found["errors of one"] += [
        failure(lambda: svd(mine(A), 4, group=group)),
        failure(lambda: ooc(lambda: iter([mine(A)]), 4, group=group)),
    ]
    torch.linalg.qr = qr
    # Ranks whose rounding would send them separate ways take that of the first.
    basis = matrix_free._Basis
    least = basis._least_rank
    if last:
        basis._least_rank = lambda self, rtol: (least(self, rtol) or 0) + 3
        out_of_core._quotient = lambda *_, **__: None
    apart = [
        svd(mine(A), rtol=0.2, group=group),
        ooc(lambda: iter([mine(A)]), 5, group=group),
    ]
    found["apart"] = [(*result[1:], result.info.sweeps) for result in apart]
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # threads of gloo now and then abort an ordinary exit


if __name__ == "__main__":
    main()
