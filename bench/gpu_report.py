# SPDX-License-Identifier: Apache-2.0
"""gpu_check.sh's last step: what its stages left behind, as one JSON file and one readable page.

python bench/gpu_report.py RESULTS OUT DEVICE
"""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def output(*command: str) -> str | None:
    """What a program prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(device: str) -> dict[str, str]:
    changes = output("git", "status", "--porcelain", "--untracked-files=no")
    query = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "device": output(*query) or "no GPU found" if device == "cuda" else "cpu (self-test)",
        "python": sys.version.split()[0],
        "nvcc": "".join(re.findall(r"release (\S+),", output("nvcc", "--version") or "")),
        "commit": os.environ.get("STRUCTMAT_COMMIT")
        or output("git", "rev-parse", "HEAD")
        or "unknown",
        "modified": "unknown" if changes is None else str(bool(changes)),
    }


WORDS = {
    "0": "passed",
    "77": "skipped",
    "124": "ran out of time",
    "137": "killed: out of time or memory",
}


def stages(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines():
        name, status, seconds = line.split("\t")
        word = WORDS.get(status, f"failed, status {status}")
        found.append({"stage": name, "result": word, "seconds": int(seconds)})
    return found


def tests(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    suite = next(ElementTree.parse(path).iter("testsuite"))
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    messages = {
        f"{case.get('classname')}::{case.get('name')}": problem.get("message") or ""
        for case in suite.iter("testcase")
        for problem in [*case.findall("failure"), *case.findall("error")]
    }
    return {**counts, "failed": messages}


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the scalar entries."""
    simple = (str, int, float, bool)
    columns = list(
        dict.fromkeys(k for row in rows for k, v in row.items() if isinstance(v, simple))
    )
    text = [[format(row.get(c, ""), ".4g") if isinstance(row.get(c), float) else str(row.get(c, ""))
             for c in columns] for row in rows]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(columns, *text, strict=True)]
    lines = [columns, ["-" * w for w in widths], *text]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """{"seconds": {"torch": 1}} as {"seconds torch": 1}."""
    out = {}
    for key, value in row.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        out.update({f"{key} {name}".strip(): entry for name, entry in inner})
    return out


def tables(bench: Any) -> list[str]:
    """Every list of objects in a bench's file: its summary, its measurements."""
    lists = [bench] if isinstance(bench, list) else list(bench.values())
    rows = [v for v in lists if isinstance(v, list) and v and isinstance(v[0], dict)]
    return [table([flat(row) for row in each]) for each in rows]


def main() -> None:
    results, out, device = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    report: dict[str, Any] = {"machine": machine(device), "stages": stages(results / "stages.tsv")}
    report["tests"] = tests(results / "tests.xml")
    report["benches"] = {}
    for path in sorted(results.glob("bench_*.json")):
        try:
            report["benches"][path.stem] = json.loads(path.read_text())
        except json.JSONDecodeError:  # the stage was cut off
            report["benches"][path.stem] = []

    page = ["# GPU check", table([report["machine"]]), "## Stages", table(report["stages"])]
    if report["tests"]:
        failed = list(report["tests"]["failed"].items())
        lines = [f"- `{name}`: {(message or 'failed').splitlines()[0]}" for name, message in failed]
        more = [f"- and {len(lines) - 40} more"] if len(lines) > 40 else []
        page += ["## Tests", table([report["tests"]]), "\n".join(lines[:40] + more)]
    for name, bench in report["benches"].items():
        page += [f"## {name}", *(tables(bench) or ["No measurement was finished."])]
    text = "\n\n".join(filter(None, page)) + "\n"
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "gpu_check.md").write_text(text)
    print(text)
    names = {stage["stage"] for stage in report["stages"]}
    passed = all(stage["result"] in ("passed", "skipped") for stage in report["stages"])
    sys.exit(0 if passed and "tests" in names else 1)


if __name__ == "__main__":
    main()
