"""An experiment's plot: points with their deviations, a line over the variants' places, or quality over cost."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from gem_ray.experiments.definition import Column, Experiment
from gem_ray.experiments.results import Cell, Results
from gem_ray.look.plots import SERIES, Series, dress, label_points, new_figure

_TITLE_CHARACTERS, _NAME_CHARACTERS = 80, 34
_ROW = 0.36  # inches of a row of points


def plot(experiment: Experiment, results: Results) -> Figure:
    """The plot that the experiment's definition asks for: points, a line or a scatter."""
    wanted = experiment.plot.columns
    columns = [column for column in experiment.columns if (column.label in wanted if wanted else column.is_ratio)]
    rows = [row.label for row in experiment.table_rows if any(results[row.label][c.label] for c in columns)]
    columns = [column for column in columns if any(results[row][column.label] for row in rows)]
    height = 1.4 + _ROW * len(rows) if experiment.plot.kind == "points" else 4
    figure = new_figure(height=height, title=fill(experiment.title, _TITLE_CHARACTERS))
    axes = figure.subplots()
    dress(axes)
    draw = {"points": _points, "line": _line, "scatter": _scatter}[experiment.plot.kind]
    draw(axes, experiment, results, rows, columns)
    if len(columns) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _points(
    axes: Axes, experiment: Experiment, results: Results, rows: Sequence[str], columns: Sequence[Column]
) -> None:
    """A line of points for each row, a point for each column: unlike a bar, a point needs no axis that begins at 0."""
    for number, (column, series) in enumerate(zip(columns, _series(columns), strict=True)):
        cells = {place: cell for place, row in enumerate(rows) if (cell := results[row][column.label])}
        shift = 0.5 * ((number + 0.5) / len(columns) - 0.5)
        axes.errorbar(
            [100 * cell.mean for cell in cells.values()],
            [place + shift for place in cells],
            xerr=_errors(list(cells.values())),
            fmt=series.mark,
            color=series.colour,
            label=column.label,
            capsize=2,
            markersize=5,
        )
    axes.set_yticks(range(len(rows)), [fill(row, _NAME_CHARACTERS) for row in rows], fontsize="small")
    axes.set(xlabel="percent", ylim=(len(rows) - 0.5, -0.5))


def _line(axes: Axes, experiment: Experiment, results: Results, rows: Sequence[str], columns: Sequence[Column]) -> None:
    """A curve for each column over the variants' places."""
    at = {variant.name: variant.at for variant in experiment.variants}
    row_places = {row.label: at.get(row.fmnerg or row.gmner or "") for row in experiment.table_rows}
    places = {row: place for row, place in row_places.items() if place is not None}
    for column, series in zip(columns, _series(columns), strict=True):
        points = sorted((places[row], cell) for row in rows if row in places and (cell := results[row][column.label]))
        cells = [cell for _, cell in points]
        axes.errorbar(
            [x for x, _ in points],
            [100 * cell.mean for cell in cells],
            _errors(cells),
            fmt=series.mark + series.stroke,
            color=series.colour,
            label=column.label,
            capsize=2,
            markersize=5,
        )
    axes.set(xlabel=experiment.plot.x, ylabel="percent")


def _scatter(
    axes: Axes, experiment: Experiment, results: Results, rows: Sequence[str], columns: Sequence[Column]
) -> None:
    """Quality over cost: a numbered point for each row, its name beside the plot.

    The line joins the rows that nothing cheaper equals.
    """
    names = "\n".join(f"{number}  {row}" for number, row in enumerate(rows, start=1))
    axes.annotate(names, (1.02, 1), xycoords="axes fraction", va="top", fontsize="small", linespacing=1.5)
    cost_column = next(column for column in experiment.columns if column.label == experiment.plot.x)
    scale, unit = (100, ", percent") if cost_column.is_ratio else (1, "")
    axes.set(xlabel=f"{experiment.plot.x}{unit}", ylabel=columns[0].label if len(columns) == 1 else "percent")
    costs = [cost.mean for row in rows if (cost := results[row][experiment.plot.x])]
    if not cost_column.is_ratio and all(cost > 0 for cost in costs):
        axes.set(xscale="log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1)
    drawn = []
    for column, series in zip(columns, _series(columns), strict=True):
        points = [
            (scale * cost.mean, 100 * quality.mean, str(place))
            for place, row in enumerate(rows, start=1)
            if (cost := results[row][experiment.plot.x]) and (quality := results[row][column.label])
        ]
        axes.plot([p[0] for p in points], [p[1] for p in points], series.mark, color=series.colour, label=column.label)
        best = pareto(points)
        axes.plot([p[0] for p in best], [p[1] for p in best], series.stroke, color=series.colour, linewidth=0.8)
        drawn += points
    label_points(axes, [(x, y) for x, y, _ in drawn], [place for _, _, place in drawn])


def pareto(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of (cost, quality, name), those that nothing cheaper equals, by rising cost."""
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda entry: (entry[0], -entry[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def _series(columns: Sequence[Column]) -> list[Series]:
    return [SERIES[number % len(SERIES)] for number in range(len(columns))]


def _errors(cells: Sequence[Cell]) -> list[float]:
    return [100 * (cell.deviation or 0.0) for cell in cells]
