"""Draws docs/images/schedule.png, a cohort padded and packed, and prints a table of utilisations.

python docs/draw_schedule.py [PATH]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedexp.data import ClientBatching, uniform
from fedexp.data.glyphs import example_counts
from fedexp.engine import schedule as schedule_lib
from fedexp.engine.schedule import Schedule

_WRITERS, _SEED = 3400, 0
_COHORT, _LANES = 10, 4
_TABLE_COHORTS, _TABLE_LANES, _TABLE_ROUNDS = (10, 100), (1, 4, 8, 32), 20
_BATCHING = ClientBatching(batch_size=20, local_epochs=1)

# Tableau's ten, in the order of the clients' lengths.
_COLOURS = "#4e79a7 #f28e2b #59a14f #e15759 #76b7b2 #edc948 #b07aa1 #ff9da7 #9c755f #8a97a8"
_INK, _WASTE = "#24292f", "#eef0f3"


def cohort(size: int, round_: int) -> np.ndarray:
    """The clients that a run with this seed samples in a round."""
    return uniform(size).sample([f"{i}" for i in range(_WRITERS)], _SEED, round_).clients


def packed(sizes: np.ndarray, lanes: int) -> Schedule:
    """The schedule of clients with these numbers of examples."""
    steps = _BATCHING.num_steps(sizes)
    lane_of, start_of = schedule_lib.assign(steps, lanes)
    seeds = [[_SEED, client] for client in range(len(sizes))]
    return schedule_lib.pack(
        _BATCHING.order(sizes, np.cumsum(sizes) - sizes, seeds),
        steps,
        lane_of,
        start_of,
        lanes=lanes,
        slots=len(sizes),
        steps=int((start_of + steps).max()),
        batch_sizes=(_BATCHING.batch_size,),
    )


def utilisation(schedule: Schedule) -> float:
    """Real examples over computed ones."""
    return float((schedule.rows >= 0).mean())


def draw(sizes: np.ndarray, clients: np.ndarray) -> Figure:
    """Above a lane for every client, below `_LANES` lanes; equal areas are equal work."""
    schedules = (packed(sizes, len(sizes)), packed(sizes, _LANES))
    labels = [f"{client} · {size}" for client, size in zip(clients, sizes, strict=True)]
    longest_first = np.argsort(-_BATCHING.num_steps(sizes), kind="stable").tolist()
    colours = {client: _COLOURS.split()[rank] for rank, client in enumerate(longest_first)}

    figure = Figure(figsize=(10, 6.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[len(sizes) + 0.2, _LANES + 0.2])
    titles = ("Every client padded to the longest", f"Packed on {_LANES} lanes")
    for axes, schedule, title in zip(panels, schedules, titles, strict=True):
        _draw_lanes(axes, schedule, labels, colours)
        _title(axes, title, schedule)
    panels[0].set_ylabel("client", color=_INK)
    panels[1].set_ylabel("lane", color=_INK)
    panels[1].set_yticks(range(_LANES))
    panels[1].set_xlim(0, max(len(schedule.rows) for schedule in schedules))
    panels[1].set_xlabel(
        f"local step, a batch of {_BATCHING.batch_size} in every lane"
        "    [on the bars: writer · examples]",
        color=_INK,
    )
    return figure


def _draw_lanes(axes: Axes, schedule: Schedule, labels: list[str], colours: dict[int, str]) -> None:
    steps, lanes, batch_size = schedule.rows.shape
    waste = {"facecolor": _WASTE, "edgecolor": "#c3c9d1", "hatch": "////", "lw": 0}
    for lane in range(lanes):
        top, height = lane - 0.42, 0.84
        axes.add_patch(Rectangle((0, top), steps, height, **waste))
        for segment in np.flatnonzero(schedule.ends[:, lane]):
            client = int(schedule.slots[segment, lane])
            begin, end = schedule.starts[segment, lane], schedule.bounds[segment + 1]
            width = (schedule.rows[begin:end, lane] >= 0).sum() / batch_size
            colour = colours[client]
            axes.add_patch(Rectangle((begin, top), width, height, color=colour, lw=0))
            if begin:
                axes.vlines(begin, top, top + height, "white", lw=3)
            batches = np.arange(begin + 1, end)
            axes.vlines(batches, top, top + height, "white", lw=1, alpha=0.3)
            text = {"color": "white" if _is_dark(colour) else _INK, "fontsize": 8.5}
            axes.text(begin + 0.2, lane, labels[client], va="center_baseline", **text)
    axes.set_ylim(lanes - 0.5, -0.5)
    axes.set_yticks([])
    axes.tick_params(colors=_INK, length=0)
    axes.spines[:].set_visible(False)


def _title(axes: Axes, title: str, schedule: Schedule) -> None:
    real = (schedule.rows >= 0).sum()
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=_INK)
    axes.set_title(
        f"{real:,} real / {schedule.rows.size:,} computed examples: "
        f"{utilisation(schedule):.0%} utilisation",
        loc="right",
        fontsize=10.5,
        color=_INK,
    )


def _is_dark(colour: str) -> bool:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue < 150


def table(sizes: np.ndarray) -> str:
    """Mean utilisations over the first `_TABLE_ROUNDS` cohorts, in Markdown."""
    lines = [
        "| cohort | a lane each |" + "".join(f" {n} lane{'s' * (n > 1)} |" for n in _TABLE_LANES)
    ]
    lines.append("| ---: |" + " ---: |" * (len(_TABLE_LANES) + 1))
    for size in _TABLE_COHORTS:
        cohorts = [sizes[cohort(size, round_)] for round_ in range(_TABLE_ROUNDS)]
        means = [
            np.mean([utilisation(packed(one, lanes)) for one in cohorts])
            for lanes in (size, *_TABLE_LANES)
        ]
        lines.append(f"| {size} |" + "".join(f" {100 * mean:.0f} % |" for mean in means))
    return "\n".join(lines)


if __name__ == "__main__":
    default = Path(__file__).parent / "images" / "schedule.png"
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path.parent.mkdir(parents=True, exist_ok=True)
    train_sizes, _ = example_counts(_WRITERS)
    first = cohort(_COHORT, 0)
    draw(train_sizes[first], first).savefig(path, dpi=120)
    print(f"wrote {path}\n\n{table(train_sizes)}")
