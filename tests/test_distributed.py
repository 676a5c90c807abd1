# SPDX-License-Identifier: Apache-2.0
"""Row shards in several processes (gloo) against one process."""

import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from reference import streamed_rows

import structmat as sm

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


@pytest.fixture(scope="module")
def alone():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield distributed_worker.calls()
    torch.set_num_threads(before)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree(ranks, alone, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, distributed_worker.__file__, str(rank), str(ranks), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, errors in zip(processes, said, strict=True):
        assert process.returncode == 0, errors
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]

    dense = sm.linalg.randomized_svd(dict(distributed_worker.matrices())["tall"], 5)
    expected = alone | {"dtensor": (*dense, dense.info.error)}
    for name, (U, S, Vh, error) in expected.items():
        for part in parts[1:]:
            assert torch.equal(part[name][1], parts[0][name][1]), name
            assert torch.equal(part[name][2], parts[0][name][2]), name
            assert part[name][3] == parts[0][name][3], name
        got = torch.cat([part[name][0] for part in parts])
        scale = float(S[0])
        assert got.shape == U.shape, name
        assert abs(parts[0][name][3] - error) < 1e-5, name
        torch.testing.assert_close(parts[0][name][1], S, rtol=0, atol=1e-5 * scale, msg=name)
        approximation = (got * parts[0][name][1]) @ parts[0][name][2]
        torch.testing.assert_close(approximation, (U * S) @ Vh, rtol=0, atol=1e-5 * scale, msg=name)
        k = len(S)
        off = got.double().mT @ got.double() - torch.eye(k, dtype=torch.float64)
        assert off.abs().max() < (1e-13 if S.dtype == torch.float64 else 1e-5), name
        assert (got.gather(0, got.abs().argmax(0)[None]) > 0).all(), name

    A = dict(distributed_worker.matrices())["tall"]
    for number, (seen, mean, S, Vh) in enumerate(parts[0]["streams"]):
        for part in parts[1:]:
            assert part["streams"][number][0] == seen
            for mine, first in zip(part["streams"][number][1:], (mean, S, Vh), strict=True):
                assert torch.equal(mine, first)
        wide = torch.cat([A] * (Vh.shape[1] // 40), 1)
        centred, want = streamed_rows(wide, center=True)
        assert seen == len(A)
        torch.testing.assert_close(mean, want)
        truth = torch.linalg.svdvals(centred)[:4]
        torch.testing.assert_close(S, truth, rtol=1e-2 if number else 1e-6, atol=0)

    says = (
        "ValueError: randomized_svd: rank is 4 on rank 0",
        "ValueError: randomized_svd: columns is 40 on rank 0",
        "ValueError: randomized_svd: center is False on rank 0",
        "ValueError: randomized_svd: the number of matrices in A is 1 on rank 0 of the group and 2",
        "ValueError: randomized_svd: the number of matrices in A is 2 on rank 0 of the group and 1",
        "_LinAlgError: randomized_svd: A contains NaN",
        "the disk is gone",
        "ValueError: svd_out_of_core: rank is 4 on rank 0 of the group and 5",
        "ValueError: all_merge: rank is 4 on rank 0 of the group and 5",
    )
    for rank, part in enumerate(parts):
        for message, found in zip(says, part["errors"], strict=True):
            assert message in found, (rank, found)
        for mine, first in zip(part["apart"], parts[0]["apart"], strict=True):
            assert torch.equal(mine[0], first[0])
            assert torch.equal(mine[1], first[1])
            assert mine[2] == first[2]
        for found in part["errors of one"]:
            if rank < ranks - 1:
                assert found.startswith("RuntimeError: "), (rank, found)
                assert f"rank {ranks - 1} of the group failed" in found, (rank, found)
            else:
                kinds = ("ValueError", "OSError", "TypeError", "RuntimeError", "AssertionError")
                assert found.startswith(kinds), (rank, found)
                assert "of the group failed" not in found, (rank, found)
        assert "no memory" in part["merge"], (rank, part["merge"])


def test_wrong_groups():
    with pytest.raises(TypeError, match="StreamingSVD"):
        sm.linalg.all_merge(3)
    with pytest.raises(RuntimeError, match="not initialised"):
        sm.linalg.all_merge(sm.linalg.StreamingSVD(4, 2))
