"""Plots in the theme's colours; series are told apart by mark and stroke, too, so that they read in grey print."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from gem_ray.look.pages import colour

INK, QUIET, LINE = colour("ink"), colour("quiet"), colour("line")
_MARKER = 5.0  # in points, half of it around the middle
_AROUND = ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))


class Series(NamedTuple):
    """How one curve, or one column of points, is drawn."""

    colour: str
    mark: str
    stroke: str


SERIES = tuple(
    Series(colour(name), mark, stroke)
    for name, mark, stroke in zip(
        ("accent", "warn", "good", "bad", "ink", "quiet"), "os^DvX", ("-", "--", "-.", ":", "-", "--"), strict=True
    )
)


def new_figure(width: float = 7, height: float = 4, title: str = "") -> Figure:
    """An empty figure.

    Args:
        width: in inches.
        height: in inches.
        title: over it; long ones must be broken into lines.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium", color=INK)
    return figure


def dress(axes: Axes, grid: str = "both") -> None:
    """Give axes the look: a quiet frame, and a grid behind the data along `both`, `x` or `y`."""
    axes.grid(color=LINE, linewidth=0.6, axis=grid)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.tick_params(colors=QUIET, labelcolor=INK)
    for side, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(side in ("left", "bottom"))


def label_points(axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str]) -> list[Annotation]:
    """Write a label at each point, where it lies over no other label and no point; the axes' limits must be final.

    Args:
        axes: whose figure has its final size.
        points: in data coordinates.
        labels: one for each point.
    """
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    notes = [
        axes.annotate(
            label,
            point,
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize="small",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0},
        )
        for point, label in zip(points, labels, strict=True)
    ]
    for note in notes:
        note.set_in_layout(False)  # the layout would move the points
    figure.draw_without_rendering()
    half = _MARKER * figure.dpi / 72
    middles = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - half / 2, y - half / 2, half, half) for x, y in middles]
    for note, (x, y) in zip(notes, middles, strict=True):
        extent = Text.get_window_extent(note)  # without the line to the point
        width, height = extent.width, extent.height
        for distance, (right, up) in product(range(1, 1 + len(points)), _AROUND):
            offset = right * (width / 2 + half * distance), up * (height / 2 + half * distance)
            place = Bbox.from_bounds(x + offset[0] - width / 2, y + offset[1] - height / 2, width, height)
            if not any(place.overlaps(other) for other in taken):
                break
        taken.append(place)
        note.set_position((offset[0] * 72 / figure.dpi, offset[1] * 72 / figure.dpi))
    return notes
