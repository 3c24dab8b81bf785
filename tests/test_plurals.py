import pytest

from gem_ray.plurals import counted


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, "post"), "0 posts"),
        ((1, "post"), "1 post"),
        ((1_000, "file"), "1,000 files"),
        ((1, "entity", "entities"), "1 entity"),
        ((2, "entity", "entities"), "2 entities"),
    ],
)
def test_one_thing_is_one_thing(arguments, text):
    assert counted(*arguments) == text
