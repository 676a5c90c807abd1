# SPDX-License-Identifier: Apache-2.0
"""The report of bench/gpu_check.sh: its words, its status, what it says without git."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_report.py"
TESTS = """<testsuites><testsuite tests="2" failures="1" errors="0" skipped="0">
<testcase classname="t" name="a"/>
<testcase classname="t" name="b"><failure message="no"/></testcase>
</testsuite></testsuites>"""


def report(folder: Path, stages: dict[str, int], **variables: str) -> tuple[int, dict]:
    """Status and content of the report on these stages, made outside of any git checkout."""
    results = folder / "results"
    results.mkdir()
    lines = [f"{name}\t{status}\t1\n" for name, status in stages.items()]
    (results / "stages.tsv").write_text("".join(lines))
    (results / "tests.xml").write_text(TESTS)
    (results / "bench_x.json").write_text('[{"name": "y", "seconds": {"ours": 1.5}}]')
    environment = {k: v for k, v in os.environ.items() if k != "STRUCTMAT_COMMIT"}
    environment |= {"GIT_CEILING_DIRECTORIES": str(folder.parent), **variables}
    command = [sys.executable, SCRIPT, results, folder, "cpu"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False)
    page = (folder / "gpu_check.md").read_text()
    assert "seconds ours" in page
    return done.returncode, json.loads((folder / "gpu_check.json").read_text())


def test_words(tmp_path: Path) -> None:
    status, found = report(
        tmp_path, {"tests": 0, "memcheck": 77, "build": 124, "toolkit": 137, "bench_x": 3}
    )
    assert status == 1
    assert [stage["result"] for stage in found["stages"]] == [
        "passed",
        "skipped",
        "ran out of time",
        "killed: out of time or memory",
        "failed, status 3",
    ]
    assert found["tests"]["failed"] == {"t::b": "no"}


@pytest.mark.parametrize(("last", "wanted"), [(0, 0), (77, 0), (1, 1), (124, 1)])
def test_status(tmp_path: Path, last: int, wanted: int) -> None:
    assert report(tmp_path, {"tests": 0, "memcheck": last})[0] == wanted


def test_without_tests_it_fails(tmp_path: Path) -> None:
    assert report(tmp_path, {"build": 0})[0] == 1


def test_commit_without_git(tmp_path: Path) -> None:
    machine = report(tmp_path, {"tests": 0})[1]["machine"]
    assert (machine["commit"], machine["modified"]) == ("unknown", "unknown")


def test_commit_by_name(tmp_path: Path) -> None:
    machine = report(tmp_path, {"tests": 0}, STRUCTMAT_COMMIT="abc")[1]["machine"]
    assert (machine["commit"], machine["modified"]) == ("abc", "unknown")
