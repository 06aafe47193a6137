"""One HTML file about finished runs, which needs no network: curves, what the bindings do, and tables."""

from __future__ import annotations

import html
import importlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedexp.errors import UserError
from fedexp.runs import AXES, SEED, UNBOUND, Run, Setting, differing, number, settings, shortened

# Okabe and Ito's, which colour-blind readers tell apart.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("solid", "dash", "dot")  # As plotly has them; CSS's are of the same order.
_BORDERS = ("solid", "dashed", "dotted")
_AXES = [x for x in AXES if x != "bits_up"]
_RATIO = 5.0  # From which on numbers are shown by their logarithms.

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 84rem; padding: 0 1.5rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem }
.plots > div { min-width: 0; height: 25rem }
.plots > .whole { grid-column: 1 / -1 }
@media (max-width: 60rem) { .plots { grid-template-columns: minmax(0, 1fr) } }
.legend { display: grid; max-height: 12rem; overflow-y: auto; column-gap: 1rem }
.legend label { cursor: pointer }
.legend i { display: inline-block; width: 2rem; vertical-align: middle; border-top: 3px }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
th { cursor: pointer; user-select: none; border-bottom: 2px solid #888 }
th[data-order="1"]::after { content: " \\25b2" } th[data-order="-1"]::after { content: " \\25bc" }
tbody tr:hover { background: #f3f6fa }
"""
_SCRIPT = """
document.querySelectorAll(".legend input").forEach(box => box.addEventListener("change", () => {
  document.querySelectorAll(".js-plotly-plot").forEach(plot => {
    const traces = [...plot.data.keys()].filter(i => plot.data[i].legendgroup === box.value);
    if (traces.length) Plotly.restyle(plot, {visible: box.checked}, traces);
  });
}));
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const table = head.closest("table"), column = head.cellIndex, order = -(head.dataset.order || 1);
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => (a === "") - (b === "")
    || order * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  table.querySelectorAll("th").forEach(other => delete other.dataset.order);
  head.dataset.order = order;
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort((a, b) => compare(key(a), key(b))));
}));
"""


class Cell(NamedTuple):
    """What a table shows, and by what it is sorted.

    Attributes:
      text: that is shown.
      value: the number that it stands for, if it does.
    """

    text: str
    value: float | None = None


def page(runs: Sequence[Run], names: Sequence[str], metrics: Sequence[str]) -> str:
    """The report.

    Args:
      runs: at least one.
      names: what runs are called, one each.
      metrics: to be drawn and listed, the most important first.

    Raises:
      UserError: plotly is not there.
    """
    try:
        script = importlib.import_module("plotly.offline").get_plotlyjs()
    except ImportError as error:
        raise UserError("--html needs plotly: pip install 'fedexp[report]'") from error
    found = settings(runs)
    seeds = len({run.bindings.get(SEED) for run in runs})
    title = f"{_count(len(runs), 'run')}, {_count(len(found), 'setting')}, {_count(seeds, 'seed')}"
    parts = []
    for heading, figures, key in (
        ("Metrics against what they cost", curves(found, metrics), _legend(found)),
        ("What the bindings do", effects(found, metrics), ""),
    ):
        if figures:
            parts += [
                f"<h2>{heading}</h2>",
                key,
                '<div class="plots">',
                *map(_div, figures),
                "</div>",
            ]
    if len(found) < len(runs):
        header = [*found[0].bindings, "runs", *metrics]
        parts += ["<h2>Over seeds</h2>", table(header, [_of(one, metrics) for one in found])]
    header = ["run", *differing(runs), *metrics]
    rows = [_row(run, name, header[1:]) for run, name in zip(runs, names, strict=True)]
    parts += ["<h2>Runs</h2>", table(header, rows)]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f"<title>{title}</title><style>{_STYLE}</style>",
            f"<script>{script}</script></head><body><h1>{title}</h1>",
            *parts,
            f"<script>{_SCRIPT}</script></body></html>\n",
        ]
    )


def curves(found: Sequence[Setting], metrics: Sequence[str]) -> list[Any]:
    """Figures of metrics against every name of `runs.AXES` that the histories have.

    The mean over seeds is a line, from the least to the greatest of them is a band.
    """
    figures = []
    for metric, x in itertools.product(metrics, _AXES):
        drawn = [(i, one, one.curve(x, metric)) for i, one in enumerate(found)]
        traces = []
        for i, one, curve in drawn:
            if curve is None:
                continue
            colour, dash = _look(i, _DASHES)
            style = {"color": colour, "dash": dash}
            shared = {"legendgroup": str(i), "type": "scatter"}
            if len(one.runs) > 1:
                outline = {"x": [*curve.x, *curve.x[::-1]], "y": [*curve.high, *curve.low[::-1]]}
                filled = {"fill": "toself", "fillcolor": colour, "line": {"width": 0}}
                hidden = {"showlegend": False, "hoverinfo": "skip", "mode": "lines"}
                traces.append({**outline, **filled, **hidden, **shared, "opacity": 0.18})
            line = {"x": curve.x, "y": curve.mean, "name": html.escape(one.label), "line": style}
            traces.append({**line, **shared, "mode": "lines+markers"})
        if traces:
            figures.append(_figure(traces, AXES[x][0], metric))
    return figures


def effects(found: Sequence[Setting], metrics: Sequence[str]) -> list[Any]:
    """Figures of the last metrics, means over seeds, against the bindings that differ.

    One number: a line with bars from the least to the greatest. Two: the grid of Reddi et al. 2021
    (arXiv:2003.00295, Figure 2), one for every combination of those that are no numbers. More:
    parallel coordinates.
    """
    names = list(found[0].bindings)
    numeric = [name for name in names if _is_numeric(one.bindings[name] for one in found)]
    others = [name for name in names if name not in numeric]
    if len(numeric) > 2 or (names and not numeric):
        shared = [name for name in metrics if all(len(one.last(name)) for one in found)]
        return [_parallel(found, names, numeric, shared)] if shared else []
    figures = []
    for metric in metrics:
        parts: dict[str, list[Setting]] = {}
        for one in found:
            if len(one.last(metric)):
                title = ", ".join(f"{n}={one.bindings[n]}" for n in others)
                parts.setdefault(title, []).append(one)
        if len(numeric) == 1:
            figures.append(_line(parts, numeric[0], metric))
        elif numeric:
            figures += [_grid(of, numeric, metric, title) for title, of in parts.items()]
    return figures


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """An HTML table that is sorted by a click on a column's head."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = [
        "<tr>"
        + "".join(
            f"<td{'' if cell.value is None else f' data-value={cell.value!r}'}>{html.escape(cell.text)}</td>"
            for cell in row
        )
        + "</tr>"
        for row in rows
    ]
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _look(i: int, styles: Sequence[str]) -> tuple[str, str]:
    """Colour and style of the line of the i-th setting."""
    return _COLOURS[i % len(_COLOURS)], styles[i // len(_COLOURS) % len(styles)]


def _legend(found: Sequence[Setting]) -> str:
    """Of all curves; a click on a setting takes its lines away."""
    looks = [_look(i, _BORDERS) for i in range(len(found))]
    width = max(len(one.label) for one in found) + 5
    columns = f"repeat(auto-fill, minmax(min({width}ch, 100%), 1fr))"
    return "".join(
        [
            f'<p class="legend" style="grid-template-columns: {columns}">',
            *(
                f'<label><input type="checkbox" value="{i}" checked> '
                f'<i style="border-top-style: {border}; border-color: {colour}"></i> '
                f"{html.escape(one.label)}</label>"
                for i, (one, (colour, border)) in enumerate(zip(found, looks, strict=True))
            ),
            "</p>",
        ]
    )


def _line(parts: Mapping[str, Sequence[Setting]], name: str, metric: str) -> Any:
    traces = []
    for i, (title, of) in enumerate(parts.items()):
        ordered = sorted(of, key=lambda one: float(one.bindings[name]))
        values = [one.last(metric) for one in ordered]
        mean = np.asarray([v.mean() for v in values])
        above, below = ([f(v) for v in values] for f in (np.max, np.min))
        bars = {
            "type": "data",
            "symmetric": False,
            "array": above - mean,
            "arrayminus": mean - below,
        }
        at = {"x": [float(one.bindings[name]) for one in ordered], "y": mean, "error_y": bars}
        colour = {"color": _COLOURS[i % len(_COLOURS)]}
        named = {"name": html.escape(title), "line": colour, "mode": "lines+markers"}
        traces.append({"type": "scatter", **at, **named})
    at = sorted({float(one.bindings[name]) for of in parts.values() for one in of})
    figure = _figure(traces, name, f"last {metric}", showlegend=len(parts) > 1)
    shown = {"tickvals": at, "ticktext": [f"{value:g}" for value in at]}
    figure.update_xaxes(type="log" if _by_logarithm(at) else "linear", **shown)
    return figure


def _grid(of: Sequence[Setting], names: Sequence[str], metric: str, title: str) -> Any:
    """A heat map: the first name from left to right, the second from bottom to top."""
    columns, rows = (sorted({one.bindings[name] for one in of}, key=float) for name in names)
    at = {tuple(one.bindings[name] for name in names): float(one.last(metric).mean()) for one in of}
    z = [[at.get((column, row)) for column in columns] for row in rows]
    text = [["" if value is None else f"{value:.4g}" for value in line] for line in z]
    heat = {
        "type": "heatmap",
        "x": columns,
        "y": rows,
        "z": z,
        "text": text,
        "colorscale": "Viridis",
    }
    look = {"texttemplate": "%{text}", "hoverongaps": False, "xgap": 2, "ygap": 2}
    figure = _figure([{**heat, **look}], names[0], names[1])
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", showgrid=False)
    figure.update_layout(title=html.escape(": ".join(filter(None, [f"last {metric}", title]))))
    return figure


def _parallel(
    of: Sequence[Setting], names: Sequence[str], numeric: Sequence[str], metrics: Sequence[str]
) -> Any:
    axes = []
    for name, short in zip(names, shortened(names), strict=True):
        texts = [one.bindings[name] for one in of]
        known = sorted(set(texts), key=float if name in numeric else str)
        places = [float(text) for text in known] if name in numeric else [*range(len(known))]
        if name in numeric and _by_logarithm(places):
            places = [math.log10(place) for place in places]
        values = [places[known.index(text)] for text in texts]
        axes.append({"label": short, "values": values, "tickvals": places, "ticktext": known})
    axes += [{"label": name, "values": [one.mean(name) for one in of]} for name in metrics]
    first = axes[len(names)]["values"]
    line = {"color": first, "colorscale": "Viridis", "showscale": True}
    fonts = {"labelfont": {"size": 13}, "tickfont": {"size": 12}, "rangefont": {"size": 12}}
    figure = _figure([{"type": "parcoords", "dimensions": axes, "line": line, **fonts}])
    figure.update_layout(margin={"t": 70, "l": 90, "r": 60})
    return figure


def _figure(traces: Sequence[Any], x: str = "", y: str = "", showlegend: bool = False) -> Any:
    go = importlib.import_module("plotly.graph_objects")
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="plotly_white",
        xaxis_title=html.escape(x),
        yaxis_title=html.escape(y),
        showlegend=showlegend,
        legend=legend,
        margin={"l": 70, "r": 20, "t": 50, "b": 60},
    )
    return figure


def _div(figure: Any) -> str:
    write = importlib.import_module("plotly.io").to_html
    offline = {
        "showSendToCloud": False,
        "plotlyServerURL": "",
    }  # Nothing leaves by a slip of the mouse.
    config = {"responsive": True, "displaylogo": False, **offline}
    written = write(figure, config=config, include_plotlyjs=False, full_html=False)
    whole = figure.data[0].type == "parcoords"
    return f'<div class="whole">{written}</div>' if whole else written


def _of(one: Setting, metrics: Sequence[str]) -> list[Cell]:
    cells = [_binding(value) for value in one.bindings.values()]
    cells.append(Cell(str(len(one.runs)), len(one.runs)))
    for metric in metrics:
        values, mean = one.last(metric), _number(one.mean(metric))
        spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
        cells.append(Cell(mean.text + spread, mean.value))
    return cells


def _row(run: Run, name: str, columns: Sequence[str]) -> list[Cell]:
    cells = [Cell(name)]
    for column in columns:
        if column in run.metrics:
            cells.append(_number(run.metrics[column]))
        else:
            cells.append(_binding(run.bindings.get(column, UNBOUND)))
    return cells


def _binding(text: str) -> Cell:
    return Cell(text, number(text))


def _number(value: float | None) -> Cell:
    return Cell("") if value is None else Cell(f"{value:.4g}", float(value))


def _is_numeric(texts: Iterable[str]) -> bool:
    return all(number(text) is not None for text in texts)


def _by_logarithm(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _RATIO


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
