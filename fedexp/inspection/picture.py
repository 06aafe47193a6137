"""A picture of how labels and examples are spread over clients."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from fedexp.inspection.splits import Census, heterogeneity, heterogeneity_by_chance

_MOST_SHOWN = 50
_LONGEST_ID = 12
_FEW = 8  # Their ids stand side by side.
_BARS = 40
_SKEWED = 20  # From which on the largest client is too large for a linear axis.


def shown(census: Census) -> np.ndarray:
    """Up to 50 clients, largest first, at even ranks by size: (k,) int64, rows of `counts`."""
    by_size = np.argsort(-census.sizes[census.looked_at], kind="stable")
    ranks = np.linspace(0, len(by_size) - 1, min(_MOST_SHOWN, len(by_size)))
    return by_size[ranks.round().astype(np.int64)]


def draw(census: Census, class_names: Sequence[str] | None = None) -> bytes:
    """A PNG of the training split.

    Clients are bars of examples by class, above columns of a map of the classes' shares in each; beside them
    are how many clients have how many examples, and the classes' shares in all. Without a label there is
    but the first of the latter two.

    Args:
      census: of the split.
      class_names: of the label; numbers if None.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = census.counts
    title = f"{len(census.sizes):,} clients, {census.sizes.sum():,} examples"
    if counts is None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        _draw_sizes(figure.add_subplot(), census.sizes)
    else:
        rows, classes = shown(census), np.arange(counts.shape[1])
        columns, of_shown = np.arange(len(rows)), counts[rows]
        spread = classes / max(len(classes) - 1, 1)
        colours = colormaps["tab10"](classes) if len(classes) <= 10 else colormaps["turbo"](spread)
        figure = Figure(figsize=(13, 5.5 + min(len(classes), 64) / 16), layout="constrained")
        grid = {"width_ratios": (3.2, 1), "height_ratios": (1, 1 + len(classes) / 64)}
        (bars, sizes), (shares, pooled) = figure.subplots(2, 2, gridspec_kw=grid)
        for of_class, colour in zip(classes, colours, strict=True):
            below = of_shown[:, :of_class].sum(1)
            bars.bar(columns, of_shown[:, of_class], 0.85, below, color=colour, linewidth=0)
        bars.set(xlim=(-0.5, len(rows) - 0.5), xticks=[], ylabel="examples")
        bars.set_title(f"{_which(census, len(rows))}: examples by {census.label}")
        image = shares.imshow(
            (of_shown / of_shown.sum(1, keepdims=True)).T,
            aspect="auto",
            cmap="Blues",
            vmin=0,
            interpolation="nearest",
        )
        names = [str(name) for name in class_names or classes]
        ids = census.client_ids[census.looked_at[rows]]
        shares.set(xlim=(-0.5, len(rows) - 0.5), ylabel=census.label)
        shares.set_xticks(columns, [f"{name:.{_LONGEST_ID}}" for name in ids])
        if len(rows) > _FEW:
            shares.tick_params(axis="x", labelsize=6, rotation=90)
        shares.set_title(f"Shares of {census.label} in each client's examples")
        figure.colorbar(image, ax=shares, pad=0.01, aspect=40, format="{x:.0%}")
        for axes in (shares, pooled):
            axes.set_yticks(classes, names, fontsize=8 if len(classes) <= 20 else 6)
        pooled.barh(classes, counts.sum(0) / counts.sum(), 0.85, color=colours)
        pooled.set_ylim(len(classes) - 0.5, -0.5)
        pooled.xaxis.set_major_formatter("{x:.0%}")
        pooled.set_title(f"Shares of {census.label} in all")
        _draw_sizes(sizes, census.sizes)
        title += (
            f"; heterogeneity of {census.label} {heterogeneity(counts):.3f}, "
            f"{heterogeneity_by_chance(counts):.3f} by chance"
        )
    figure.suptitle(title, weight="bold")
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return file.getvalue()


def _draw_sizes(axes, sizes: np.ndarray) -> None:
    low, end, middle = int(sizes.min()), int(sizes.max()) + 1, np.median(sizes)
    # Edges are whole numbers, lest some bars be of more sizes than others.
    if end > _SKEWED * middle:
        edges = np.unique(np.geomspace(low, end, _BARS).round())
        axes.set_xscale("log")
    else:
        step = -(-(end - low) // _BARS)
        edges = np.arange(low, end + step, step)
    axes.hist(sizes, edges, color="0.45")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(middle, color="tab:red", label=f"median {middle:g}")
    axes.set(xlabel="examples of a client", ylabel="clients")
    axes.set_title("All clients by size")
    axes.legend()


def _which(census: Census, count: int) -> str:
    total = len(census.sizes)
    if count == total:
        return f"All {total:,} clients by size"
    return f"{count} of {total:,} clients, at even ranks by size"
