# SPDX-License-Identifier: Apache-2.0
"""The report's plots as inline SVG whose colours follow the page, light or dark."""

import io
import re
from collections import defaultdict
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from structmat.demo.methods import METHODS
from structmat.demo.run import Demo, Result

# Placeholders that become CSS variables: no plot uses these near-blacks otherwise.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_COLOURS = {method: f"#0a{i:02x}{i:02x}" for i, method in enumerate(METHODS, 1)}
_DEPTH = [f"#0b0{i}0{i}" for i in range(1, 7)]
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--rule",
    _PAPER: "--paper",
    **{colour: f"--{method}" for method, colour in _COLOURS.items()},
    **{colour: f"--depth-{i}" for i, colour in enumerate(_DEPTH)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
}


def all_plots(demo: Demo) -> dict[str, str]:
    """``{name: <svg>...</svg>}``, in the order of the page."""
    with matplotlib.rc_context(_STYLE):
        figures = {
            "quality": _quality(demo),
            "latency": _latency(demo),
            "ranks": _ranks(demo),
            "spectra": _spectra(demo),
            "errors": _errors(demo),
        }
        return {name: _svg(name, figure) for name, figure in figures.items() if figure}


def _of_method(demo: Demo) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {method: [] for method in demo.plan.methods}
    for result in sorted(demo.results, key=lambda r: r.kept):
        groups[result.method].append(result)
    return groups


def _line(axes: Axes, method: str, label: str, x: list[float], y: list[float]) -> None:
    axes.plot(
        x,
        y,
        color=_COLOURS[method],
        marker=METHODS[method].marker,
        markeredgecolor=_PAPER,
        label=label,
        zorder=4 if method == "global" else 3,
    )


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), borderpad=0.2)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(11.2, height), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(h_pad=0.1, w_pad=0.08, hspace=0.02, wspace=0.02)
    return figure


def _quality(demo: Demo) -> Figure:
    figure = _figure(4.1)
    left, right = figure.subplots(1, 2)
    for method, results in _of_method(demo).items():
        kept = [result.kept for result in results]
        _line(left, method, results[0].label, kept, [r.cosine_mean for r in results])
        _line(right, method, results[0].label, kept, [r.recall_at_10 for r in results])
    left.set(title="Embeddings", ylabel="mean cosine to the original", ylim=(0, 1.03))
    right.set(title="Retrieval", ylabel="recall@10", ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.axhline(demo.original.recall_at_10, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
    right.annotate(
        f"original {demo.original.recall_at_10:.1%}",
        (1, demo.original.recall_at_10),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=_INK,
    )
    for axes in (left, right):
        axes.set_xlabel("parameters kept in the replaced layers")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks(sorted(demo.plan.keeps))
        axes.margins(x=0.06)
    _legend_above(figure, left)
    return figure


def _latency(demo: Demo) -> Figure:
    figure = _figure(4.1)
    shapes = list(demo.original.latency_ms)
    for axes, shape in zip(figure.subplots(1, len(shapes), sharey=True), shapes, strict=True):
        for method, results in _of_method(demo).items():
            x = [result.latency_ms[shape] for result in results]
            _line(axes, method, results[0].label, x, [r.cosine_mean for r in results])
        original = demo.original.latency_ms[shape]
        axes.plot([original], [1.0], "*", color=_INK, markersize=12, label="original", zorder=5)
        axes.axvline(original, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        title = shape.replace("x", " \u00d7 ") + " tokens"
        axes.set(title=title, xlabel="latency p50, ms")
        axes.set_ylim(0, 1.06)
        axes.set_xlim(0, 1.08 * max(axes.get_xlim()[1], original))
    figure.axes[0].set_ylabel("mean cosine to the original")
    _legend_above(figure, figure.axes[0])
    return figure


def _kind_and_depth(name: str) -> tuple[str, int]:
    """``encoder.layer.3.attention.self.query`` is ``("attention.self.query", 3)``."""
    found = re.search(r"\.(\d+)\.(.+)$", name)
    return (found[2], int(found[1])) if found else (name, 0)


def _reported(demo: Demo) -> list[Result]:
    """The results of the best method that carry per-layer figures, largest first."""
    method = demo.plan.methods[-1]
    return [r for r in demo.results if r.method == method and r.layers]


def _ranks(demo: Demo) -> Figure | None:
    results = _reported(demo)
    if not results:
        return None
    layers = [_kind_and_depth(layer["name"]) for layer in results[0].layers or []]
    kinds = list(dict.fromkeys(kind for kind, _ in layers))
    depths = sorted({depth for _, depth in layers})
    figure = _figure(3.1 * ((len(results) + 1) // 2))
    grid = figure.subplots((len(results) + 1) // 2, 2, squeeze=False, sharex=True, sharey=True)
    for axes, result in zip(grid.flat, results, strict=False):
        _rank_grid(axes, result, kinds, depths)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("encoder layer")
        axes.tick_params(labelbottom=True)
    return figure


def _rank_grid(axes: Axes, result: Result, kinds: list[str], depths: list[int]) -> None:
    """One cell a layer: its rank, shaded by the share of the full rank."""
    for layer in result.layers or []:
        kind, depth = _kind_and_depth(layer["name"])
        x, y = depths.index(depth), kinds.index(kind)
        share = (layer["rank"] or min(layer["m"], layer["n"])) / min(layer["m"], layer["n"])
        axes.fill_between(
            [x - 0.47, x + 0.47],
            y - 0.45,
            y + 0.45,
            color=_COLOURS["global"],
            alpha=0.65 * share,
            lw=0,
        )
        axes.text(x, y, str(layer["rank"] or "dense"), ha="center", va="center", fontsize=9)
    axes.set_title(f"keep {result.keep:g}")
    axes.set_xticks(range(len(depths)), [str(depth + 1) for depth in depths])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlim(-0.5, len(depths) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _spectra(demo: Demo) -> Figure | None:
    results = _reported(demo)
    if not results:
        return None
    result = min(results, key=lambda r: abs(r.keep - 0.6))
    by_kind: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for layer in result.layers or []:
        kind, depth = _kind_and_depth(layer["name"])
        if layer["spectrum"]:
            by_kind[kind].append((depth, layer))
    columns = 3
    rows = -(-len(by_kind) // columns)
    figure = _figure(2.9 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, (kind, layers) in zip(grid.flat, by_kind.items(), strict=False):
        for depth, layer in layers:
            spectrum = [value / layer["spectrum"][0] for value in layer["spectrum"]]
            colour = _DEPTH[depth * len(_DEPTH) // max(len(layers), len(_DEPTH))]
            axes.plot(
                range(1, len(spectrum) + 1),
                spectrum,
                color=colour,
                linewidth=1.4,
                label=f"layer {depth + 1}",
            )
            if layer["rank"] and layer["rank"] <= len(spectrum):
                axes.plot(
                    layer["rank"],
                    spectrum[layer["rank"] - 1],
                    "o",
                    color=colour,
                    markersize=5.5,
                    markeredgecolor=_PAPER,
                    zorder=5,
                )
        axes.set(title=kind, yscale="log", ylim=(1e-4, 1.5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("index of the singular value")
    for axes in grid.flat[len(by_kind) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("relative to the largest")
    largest = max(grid.flat, key=lambda axes: len(axes.get_legend_handles_labels()[0]))
    _legend_above(figure, largest)
    return figure


def _errors(demo: Demo) -> Figure | None:
    figure = _figure(4.4)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    values: list[float] = []
    for method, results in _of_method(demo).items():
        pairs = [
            (layer["predicted_error"], layer["measured_error"])
            for result in results
            for layer in result.layers or []
            if layer["predicted_error"] and layer["measured_error"]
        ]
        if not pairs:
            continue
        predicted, measured = zip(*pairs, strict=True)
        values += [*predicted, *measured]
        style: Any = {
            "marker": METHODS[method].marker,
            "color": _COLOURS[method],
            "linestyle": "",
            "markersize": 5,
            "markeredgewidth": 0,
            "alpha": 0.7,
            "label": results[0].label,
        }
        left.plot(predicted, measured, **style)
        right.plot(predicted, [max(abs(m / p - 1), 1e-9) for p, m in pairs], **style)
    if not values:
        return None
    low, high = min(values) * 0.85, max(values) * 1.15
    dashed: Any = {"color": _MUTED, "linewidth": 1, "linestyle": (0, (4, 3)), "zorder": 1}
    left.plot([low, high], [low, high], **dashed)
    right.axhline(1e-3, **dashed)
    left.set(title="Relative output error", ylabel="measured", yscale="log", ylim=(low, high))
    right.set(title="How far the two differ", ylabel="|measured / predicted - 1|", yscale="log")
    for axes in (left, right):
        axes.set(xscale="log", xlim=(low, high), xlabel="predicted")
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend_above(figure, left)
    return figure


def _svg(name: str, figure: Figure) -> str:
    buffer = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # a salt a plot: ids must differ between the plots of one page, and not between runs
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=empty)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"(font: [^;\"]*?)'?DejaVu Sans'?[^;\"]*", r"\1system-ui, sans-serif", svg)
    svg = re.sub(
        r'id="(figure|axes|patch|matplotlib|xtick|ytick|line2d|text|legend|FillBetween)'
        r'[\w.]*"',
        "",
        svg,
    )
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-labelledby="{name}-caption"', 1)
