"""Labels of points, and what tells series apart."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text

from gem_ray.look.plots import SERIES, label_points, new_figure

places = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@settings(max_examples=15)
@given(points=places)
def test_labels_lie_over_no_other_label(points: list[tuple[int, int]]) -> None:
    axes = new_figure().subplots()
    axes.set(xlim=(-1, 7), ylim=(-1, 7))
    notes = label_points(axes, points, [f"no. {number}" for number in range(len(points))])
    extents = [Text.get_window_extent(note) for note in notes]
    assert not any(one.overlaps(other) for one, other in combinations(extents, 2))
    middles = axes.transData.transform(points)
    assert not any(extent.contains(x, y) for extent in extents for x, y in middles)


def test_series_are_told_apart_without_colours() -> None:
    assert len({series.mark for series in SERIES}) == len(SERIES)
