# SPDX-License-Identifier: Apache-2.0
"""The demonstration's results for people: terminal table, report.html, report.json."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from structmat.demo.methods import METHODS
from structmat.demo.plots import all_plots
from structmat.demo.run import Demo, Result

_MB = 1e6
_SHAPE = "32x128"  # the one the summary speaks of


def write(demo: Demo, page: Path, data: Path) -> None:
    """Writes the report as one HTML file that needs no other, and its numbers as JSON."""
    page.write_text(html(demo), encoding="utf-8")
    data.write_text(json.dumps(demo.to_dict(), allow_nan=False) + "\n", encoding="utf-8")


def html(demo: Demo) -> str:
    """The report as one HTML page."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(
        files("structmat.demo").joinpath("template.html").read_text(encoding="utf-8")
    )
    plots = {name: Markup(svg) for name, svg in all_plots(demo).items()}
    return template.render(
        demo=demo,
        methods=METHODS,
        headline=headline(demo),
        best=_best(demo),
        summary=summary(demo),
        plots=plots,
        shapes=list(demo.original.latency_ms),
        shape=_SHAPE,
        mb=_MB,
        layered=[r for r in _best(demo) if r.layers],
    )


def _best(demo: Demo) -> list[Result]:
    """The results of the plan's last, best method, largest model first."""
    method = demo.plan.methods[-1]
    return sorted((r for r in demo.results if r.method == method), key=lambda r: -r.keep)


def headline(demo: Demo) -> Result:
    """The size the summary leads with: the best method, nearest to six tenths kept."""
    return min(_best(demo), key=lambda r: abs(r.keep - 0.6))


def summary(demo: Demo) -> list[str]:
    """What was lost and what was gained, in plain sentences."""
    original, lead = demo.original, headline(demo)
    plain = [r for r in demo.results if r.method == "svd" and r.keep == lead.keep]
    smallest = _best(demo)[-1]
    speed = lead.speedup[_SHAPE]
    gained = (
        f"Gained: the linear layers keep {lead.kept:.0%} of their parameters, the file shrinks "
        f"from {original.file_bytes / _MB:.0f} to {lead.file_bytes / _MB:.0f} MB, and a batch of "
        f"32 sentences of 128 tokens takes {lead.latency_ms[_SHAPE]:.0f} instead of "
        f"{original.latency_ms[_SHAPE]:.0f} ms, {_times(speed)}."
    )
    lost = (
        f"Lost: embeddings have a mean cosine of {lead.cosine_mean:.3f} to the original ones, and "
        f"the right document is among the first ten for {lead.recall_at_10:.1%} of the queries, "
        f"against {original.recall_at_10:.1%} for the original."
    )
    sentences = [gained, lost]
    if plain:
        sentences.append(
            f"Plain SVD of the weights at the same size: cosine {plain[0].cosine_mean:.3f}, "
            f"recall@10 {plain[0].recall_at_10:.1%}. Looking at the activations is what makes the "
            f"difference; nothing here was trained."
        )
    if smallest is not lead:
        sentences.append(
            f"At {smallest.kept:.0%} of the parameters: cosine {smallest.cosine_mean:.3f}, "
            f"recall@10 {smallest.recall_at_10:.1%}, {_times(smallest.speedup[_SHAPE])}, "
            f"{smallest.file_bytes / _MB:.0f} MB."
        )
    return sentences


def _times(ratio: float) -> str:
    return f"{ratio:.2f} times as fast"


def table(demo: Demo, width: int = 120) -> Table:
    """The results as a table for a terminal of this width, 80 at the least."""
    shapes = list(demo.original.latency_ms)
    result = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, int(width >= 100), 0, 0))
    result.add_column("keep, method", min_width=12)
    for name in ("par.\nM", "file\nMB", "cos\nmean", "cos\np5", "rec.\n@1", "rec.\n@10"):
        result.add_column(name, justify="right", no_wrap=True)
    for shape in shapes:
        result.add_column(f"{shape}\nms", justify="right", no_wrap=True)
    result.add_column("speed\n", justify="right", no_wrap=True)
    result.add_column("mem.\nMB", justify="right", no_wrap=True)
    result.add_row("original", *_cells(demo.original, shapes), end_section=True)
    for keep in sorted(demo.plan.keeps, reverse=True):
        rows = [r for r in demo.results if r.keep == keep]
        result.add_row(f"{keep:g}", style="dim")
        for index, row in enumerate(rows):
            result.add_row(
                row.label,
                *_cells(row, shapes),
                style="bold" if row.method == demo.plan.methods[-1] else None,
                end_section=index == len(rows) - 1,
            )
    return result


def _cells(row: Any, shapes: list[str]) -> list[str]:
    compared = isinstance(row, Result)
    return [
        f"{row.parameters / 1e6:.1f}",
        f"{row.file_bytes / _MB:.1f}",
        f"{row.cosine_mean:.3f}" if compared else "1.000",
        f"{row.cosine_p05:.3f}" if compared else "1.000",
        f"{row.recall_at_1:.3f}",
        f"{row.recall_at_10:.3f}",
        *[f"{row.latency_ms[shape]:.1f}" for shape in shapes],
        f"{row.speedup[_SHAPE]:.2f}x" if compared else "1.00x",
        f"{row.peak_bytes / _MB:.0f}",
    ]
