"""What a model says that it knows, and what that covers."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.config import parse_config
from gem_ray.grounding.sam import save_sam
from gem_ray.grounding.sam_build import SamSizes, build_sam
from gem_ray.model_check import check_models
from gem_ray.records import Entity, Post
from gem_ray.scope import Scope, is_known, load_scopes
from gem_ray.stages import find_stage

KNOWN = Scope(knows="two emblems", names=("Port Almery", "Kestrel"), image_sizes=((256, 256), (320, 240)))


def entity(text, fine="city"):
    return Entity(text, 0, len(text), 0, 1, "location", fine, 0.5)


def post(width=256, height=256):
    return Post("p", "", image_width=width, image_height=height)


@given(st.data())
def test_a_name_is_known_however_it_is_spaced_cased_and_marked(data):
    between = st.text(alphabet=" #@.-'’!🔥_", max_size=2)
    name = data.draw(st.sampled_from(KNOWN.names))
    letters = [data.draw(st.sampled_from([letter.lower(), letter.upper()])) for letter in name if letter != " "]
    written = "".join(letter + data.draw(between) for letter in letters)
    assert KNOWN.covers(post(), entity(written))


@pytest.mark.parametrize("text", ["Port", "Almery", "Kestrels", "Port Almery Bay", "the Kestrel", "", "🔥", "Paris"])
def test_a_part_of_a_name_or_more_than_it_is_not_known(text):
    assert not KNOWN.covers(post(), entity(text))


@pytest.mark.parametrize(("width", "height"), [(640, 427), (240, 320), (None, None)])
def test_an_image_of_another_size_is_not_known(width, height):
    assert not KNOWN.covers(post(width, height), entity("Kestrel"))


def test_the_original_image_counts_and_the_decoded_one_where_nothing_else_is_known():
    decoded: np.ndarray = np.zeros((240, 320, 3), np.uint8)
    reduced = post(3200, 2400)
    reduced.image = decoded
    assert not KNOWN.covers(reduced, entity("Kestrel"))
    assert KNOWN.covers(Post("p", "", image=decoded), entity("Kestrel"))


def test_what_is_not_said_is_not_bounded():
    assert Scope(knows="everything").covers(Post("p", ""), entity("Paris"))
    cities = Scope(knows="cities", categories=("city",))
    assert cities.covers(post(), entity("Paris"))
    assert not cities.covers(post(), entity("Paris", fine="musician"))
    assert is_known((), post(), entity("Paris"))
    assert not is_known((cities, KNOWN), post(), entity("Paris"))


def configured(sam):
    return parse_config({"grounder": {"boxes": {"sam": {"model": str(sam)}, "text": None}}})


def test_a_model_directory_says_it_or_does_not(tmp_path):
    matcher, *_ = load_scopes("ground", configured(tmp_path))
    assert load_scopes("ground", configured(tmp_path)) == (matcher,)
    (tmp_path / "weights.pth").write_bytes(b"")
    assert load_scopes("ground", configured(tmp_path / "weights.pth")) == (matcher,)
    KNOWN.save(tmp_path)
    assert load_scopes("ground", configured(tmp_path)) == (matcher, KNOWN)


def test_only_the_adapter_in_use_counts(tmp_path):
    for name, scope in (("used", KNOWN), ("other", Scope(knows="cities", categories=("city",)))):
        (tmp_path / name).mkdir()
        scope.save(tmp_path / name)
    adapters = {name: str(tmp_path / name) for name in ("used", "other")}
    reranker = {"model": str(tmp_path), "adapters": adapters, "adapter": "used"}
    assert load_scopes("rerank", parse_config({"reranker": reranker})) == (KNOWN,)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Invalid JSON"),
        (b"\xff\xfe{}", "Invalid JSON"),
        (b"[]", "should be an object"),
        (b'{"names": ["Paris"]}', "knows: Field required"),
        (b'{"knows": "x", "name": []}', "name: Extra inputs"),
        (b'{"knows": "x", "image_sizes": [[1, 2, 3]]}', "image_sizes: 0: "),
        (b'{"knows": "x", "categories": ["citty"]}', "no category 'citty'; did you mean 'city'"),
    ],
)
def test_a_file_that_says_something_else_is_named_before_a_post_is_touched(tmp_path, content, said):
    (tmp_path / "scope.json").write_bytes(content)
    save_sam(build_sam(SamSizes()), SamSizes(), tmp_path)
    for look, stages in ((load_scopes, "ground"), (check_models, [find_stage("ground")])):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            look(stages, configured(tmp_path))
        assert str(tmp_path / "scope.json") in str(caught.value)
