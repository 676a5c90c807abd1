# SPDX-License-Identifier: Apache-2.0
"""The compiled CUDA kernels: every architecture is there, nothing spills, and the instructions that
speed rests on appear. Needs cuobjdump (PyPI: nvidia-cuda-cuobjdump), but no GPU."""

import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import structmat  # noqa: F401  (loads the operators)

ARCHITECTURES = ("sm_80", "sm_90a")

# What must appear (regular expressions) in every kernel whose name contains the key.
EXPECTED = {
    "decode_kernel": (r"LDG\.E[.\w]*\.128",),  # weights in 16-byte loads
    "mma_product_kernel": (r"HMMA\.16816", r"LDSM"),  # tensor cores
    "fused_kernel": (r"HMMA\.16816", r"LDS[.\w]*\.128"),
    "simt_product_kernel": (r"LDGSTS",),  # asynchronous copies
    "ScatteredE": (r"HMMA\.16816", r"LDSM", r"STS\.U16"),  # joined_kernel: entries over zeros
    "GatheredE": (r"HMMA\.16816", r"LDSM\.16\.MT88", r"LDGSTS[.\w]*\.128"),  # and of strips
    "sampled_strips_kernel": (r"HMMA\.16816", r"LDSM\.16\.MT88", r"LDGSTS[.\w]*\.128"),
    "spread_strips_kernel": (r"HMMA\.16816", r"LDS\.128", r"STS\.128"),  # their sums, to columns
    "sparse_product_kernel": (r"SHFL\.IDX",),  # an entry of S for all tokens of a warp
    "few_low_rank_kernel": (r"LDG\.E[.\w]*\.128", r"LD[.\w]*\.STRONG\.GPU"),  # S beside V, U
}


def tool(name: str) -> str | None:
    spec = find_spec("nvidia")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [Path(folder) / "cu13" / "bin" / name for folder in folders]
    return next((str(path) for path in found if path.exists()), shutil.which(name))


CUOBJDUMP = tool("cuobjdump")
pytestmark = [
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump tool"),
    pytest.mark.skipif(not torch.ops.structmat.has_cuda(), reason="built without CUDA"),
]


@cache
def dump(*options: str) -> str:
    ops = find_spec("structmat._ops")
    assert ops is not None
    assert ops.origin is not None
    library = Path(ops.origin).parent / "lib" / "libstructmat.so"
    done = subprocess.run(
        [str(CUOBJDUMP), *options, str(library)], capture_output=True, text=True, check=True
    )
    return done.stdout


def kernels() -> list[tuple[str, str, dict[str, int]]]:
    """(architecture, mangled name, resources) of every kernel."""
    found, architecture = [], ""
    lines = iter(dump("-res-usage").splitlines())
    for line in lines:
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", next(lines))}
            found.append((architecture, match[1], usage))
    return found


def test_every_kernel_is_built_for_every_architecture() -> None:
    listed = set(re.findall(r"\.(sm_\w+)\.", dump("--list-elf")))
    assert listed == set(ARCHITECTURES)
    assert ".sm_90.ptx" in dump("--list-ptx")  # for GPUs yet to come
    names = {a: {name for arch, name, _ in kernels() if arch == a} for a in ARCHITECTURES}
    assert names["sm_80"]
    assert names["sm_80"] == names["sm_90a"]


def test_nothing_spills() -> None:
    spilled = [
        f"{architecture} {name}: {usage}"
        for architecture, name, usage in kernels()
        if usage["LOCAL"] > 0 or usage["STACK"] > 0
    ]
    assert not spilled, "\n".join(spilled)
    assert not re.search(r"\b(STL|LDL)\b", dump("--dump-sass"))


def test_registers_allow_two_blocks_of_256_threads() -> None:
    # The decode of 8 tokens in float64 is to have the multiprocessor for one block (launch bounds),
    # and spread sums have it for their shared memory.
    alone = ("few_low_rank_kernelIdLi8E", "spread_strips_kernel")
    greedy = [
        f"{a} {name}: {u['REG']}"
        for a, name, u in kernels()
        if u["REG"] > (255 if any(a in name for a in alone) else 128)
    ]
    assert not greedy, "\n".join(greedy)


def test_expected_instructions() -> None:
    code = {}
    for part in re.split(r"\n\s*Function : ", dump("--dump-sass"))[1:]:
        name, _, body = part.partition("\n")
        code.setdefault(name.strip(), []).append(body)
    for key, instructions in EXPECTED.items():
        matching = [body for name, bodies in code.items() if key in name for body in bodies]
        assert matching, f"no kernel is called {key}"
        for body in matching:
            missing = [i for i in instructions if not re.search(rf"\b{i}", body)]
            assert not missing, f"{key} has no {missing}"
