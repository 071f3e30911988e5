"""The house style of figures: one colour for one thing on the whole path, direct labels, intervals drawn.

Figures stand on an opaque light ground, so that they read the same in a light or dark notebook, a README or a slide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib_inline.backend_inline import set_matplotlib_formats
from numpy.typing import ArrayLike

GROUND = "#fcfcfb"


@dataclass(frozen=True)
class Colours:
    """What each colour means. Chosen to stay apart under protanopia, deuteranopia and tritanopia (tested)."""

    truth: str = "#1f1f1f"
    """The known answer, a theoretical curve, a nominal level."""
    before: str = "#666666"
    """The starting point: the base model, the naive method, the old system."""
    after: str = "#0067c2"
    """What the lesson builds or trains: your own code, the adapted model, the new system."""
    library: str = "#8f2f8a"
    """The library that practitioners use."""
    wrong: str = "#d9480f"
    """A miss, an error, a limit that is crossed."""
    other: str = "#0a9d6c"
    """A third thing: another method, another domain."""


COLOURS = Colours()


def use_house_style() -> None:
    """Set matplotlib's defaults for every figure that follows; in a notebook, figures are sharp on dense screens."""
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 100,
            "figure.facecolor": GROUND,
            "figure.constrained_layout.use": True,
            "savefig.facecolor": GROUND,
            "axes.facecolor": GROUND,
            "axes.edgecolor": "#8c8c8c",
            "axes.labelcolor": COLOURS.truth,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlepad": 10,
            "axes.labelsize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.prop_cycle": cycler(
                color=[COLOURS.after, COLOURS.before, COLOURS.library, COLOURS.other, COLOURS.wrong]
            ),
            "grid.color": "#e3e3e1",
            "grid.linewidth": 0.8,
            "xtick.color": "#4a4a4a",
            "ytick.color": "#4a4a4a",
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "font.family": "DejaVu Sans",  # ships with matplotlib, so figures are the same on every machine
            "font.size": 11,
            "lines.linewidth": 2.0,
            "lines.solid_capstyle": "round",
            "legend.frameon": False,
        }
    )
    if InteractiveShell.initialized():
        set_matplotlib_formats("retina")


def band(ax: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str) -> None:
    """Shade an interval around a curve: `x`, `low` and `high` are (n,)."""
    ax.fill_between(
        np.asarray(x, float), np.asarray(low, float), np.asarray(high, float), color=colour, alpha=0.18, lw=0
    )


def intervals(
    ax: Axes,
    x: ArrayLike,
    value: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    colour: str,
    *,
    label: str | None = None,
) -> None:
    """Draw estimates with their intervals as points and vertical bars; all (n,), `low` <= `value` <= `high`."""
    centre = np.asarray(value, float)
    below, above = centre - np.asarray(low, float), np.asarray(high, float) - centre
    if (below < 0).any() or (above < 0).any():
        raise ValueError("every interval must hold its value: pass low <= value <= high (bounds, not widths)")
    ax.errorbar(x, centre, yerr=[below, above], fmt="o", ms=6, lw=1.8, capsize=3, color=colour, label=label)


def label_lines(ax: Axes, *, gap: float = 0.075) -> None:
    """Write each labelled line's name in its colour beside its right end, instead of a legend.

    Labels that would overlap are moved apart by `gap`, a share of the axes' height. Call it when everything is drawn.
    """
    lines = [line for line in ax.get_lines() if not str(line.get_label()).startswith("_") and np.size(line.get_xdata())]
    if not lines:
        raise ValueError("no line has a label: draw with ax.plot(x, y, label='what it is') before label_lines(ax)")
    ends = [_last_point(line) for line in lines]
    heights = [float(ax.transAxes.inverted().transform(ax.transData.transform(end))[1]) for end in ends]
    furthest = max(x for x, _ in ends)
    for line, (x, _), height in zip(lines, ends, _spread(heights, gap), strict=True):
        place = furthest if _share_of_width(ax, furthest) - _share_of_width(ax, x) < 0.1 else x  # one column
        _write_beside(ax, place, height, str(line.get_label()), str(line.get_color()))


def direct_label(ax: Axes, x: float, y: float, text: str, colour: str, *, offset: tuple[float, float] = (6, 6)) -> None:
    """Write `text` in `colour` beside the data point (x, y); `offset` is in points."""
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=colour, fontweight="bold", fontsize=10)


def _last_point(line: Line2D) -> tuple[float, float]:
    x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
    finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if not len(finite):
        raise ValueError(f"the line {line.get_label()!r} has no finite point to label")
    last = finite[np.argmax(x[finite])]
    return float(x[last]), float(y[last])


def _share_of_width(ax: Axes, x: float) -> float:
    return float(ax.transAxes.inverted().transform(ax.transData.transform((x, ax.get_ybound()[0])))[0])


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart until neighbours differ by `gap`, each group staying centred on where it was."""
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(heights[index])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            merged = groups[-2] + groups[-1]
            centres[-2:] = [sum(heights[i] for i in merged) / len(merged)]
            groups[-2:] = [merged]
    placed = list(heights)
    for group, centre in zip(groups, centres, strict=True):
        half = gap * (len(group) - 1) / 2
        centre = min(max(centre, half), max(half, 1 - half))  # inside the axes, as far as they all fit
        for place, index in enumerate(group):
            placed[index] = centre - half + gap * place
    return placed


def _write_beside(ax: Axes, x: float, height: float, text: str, colour: str) -> None:
    data_and_axes = ax.get_xaxis_transform()  # x in data, y in shares of the axes
    ax.annotate(
        text, (x, height), xycoords=data_and_axes, xytext=(10, 0), textcoords="offset points", color=colour,
        fontweight="bold", fontsize=10, va="center", annotation_clip=False,
    )  # fmt: skip
