import io
import json

import numpy as np
import pytest
from PIL import Image

from gem_ray.config import ImageConfig, parse_config
from gem_ray.data.images import ImageLoader
from gem_ray.knowledge.cache import AnswerCache
from gem_ray.knowledge.explainer import Explainer
from gem_ray.knowledge.provider import KnowledgeProvider
from gem_ray.pipeline.account import Account
from gem_ray.records import Post, ProblemKind, Status


@pytest.fixture
def provider(server, tmp_path):
    """Makes a provider that asks the server and keeps answers in one folder; keywords replace explainer fields."""

    def make(**fields) -> KnowledgeProvider:
        explainer = {"base_url": server.url, "api_key_env": "TEST_KEY", "timeout_s": 30, "retries": 1, **fields}
        explainer["max_pause_s"] = 0.05
        return KnowledgeProvider.from_config(
            parse_config({"knowledge": {"explainer": explainer, "cache": tmp_path / "cache"}})
        )

    return make


class ColourCaptioner:
    """Names an image's mean colour, and remembers what it was shown."""

    def __init__(self):
        self.shown = []

    def caption(self, images):
        self.shown += images
        return ["" if image.mean() == 0 else f"mean {image.mean():.0f}" for image in images]


@pytest.fixture
def captioner():
    return ColourCaptioner()


@pytest.fixture
def captioning(captioner, tmp_path):
    def make(explainer=None) -> KnowledgeProvider:
        loader = ImageLoader(ImageConfig(root=tmp_path))
        return KnowledgeProvider(loader, captioner, "colour@1", explainer, AnswerCache(tmp_path / "cache"))

    return make


def _png(grey: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def _posts(count: int) -> list[Post]:
    return [Post(f"id{i}", f"post {i}", caption="a dog") for i in range(count)]


def _reject(post: Post) -> Post:
    post.fail("prepare", ProblemKind.BAD_RECORD, "no text")
    return post


def test_nothing_configured_is_a_no_op():
    provider = KnowledgeProvider.from_config(parse_config({}))
    posts = [Post("1", "hello", image_bytes=b"not even an image")]
    assert provider(posts) is posts
    assert posts == [Post("1", "hello", image_bytes=b"not even an image")]


def test_posts_get_knowledge_in_place(server, provider):
    knowledge = provider()
    posts = _posts(3)
    assert knowledge(posts) is posts
    assert [post.knowledge for post in posts] == ["about post 0", "about post 1", "about post 2"]
    assert (knowledge.asked, knowledge.from_cache, knowledge.repaired, knowledge.failed) == (3, 0, 0, 0)
    assert "a dog" in server.requests[0]["messages"][-1]["content"]


def test_a_second_run_asks_nothing_twice(server, provider):
    provider()(_posts(5))
    again, second = _posts(5), provider()
    second(again)
    assert [post.knowledge for post in again] == [f"about post {i}" for i in range(5)]
    assert len(server.requests) == 5
    assert (second.asked, second.from_cache) == (0, 5)


def test_another_caption_or_model_is_another_question(server, provider):
    provider()(_posts(1))
    provider()([Post("id0", "post 0", caption="a cat")])
    provider()([Post("id0", "post 0")])
    provider(model="another")(_posts(1))
    assert len(server.requests) == 4


def test_equal_posts_of_one_batch_are_asked_about_once(server, provider):
    posts = [Post(str(i), "the same text") for i in range(4)]
    provider()(posts)
    assert {post.knowledge for post in posts} == {"about the same text"}
    assert len(server.requests) == 1


def test_what_a_post_brings_is_used(server, provider):
    posts = [Post("1", "hello", knowledge="brought"), Post("2", "hello again", knowledge=" ")]
    provider()(posts)
    assert [post.knowledge for post in posts] == ["brought", "about hello again"]


def test_rejected_posts_are_not_asked_about(server, provider):
    provider()([_reject(Post("1", "hello"))])
    assert server.requests == []


def test_a_failure_costs_one_post_its_knowledge_and_no_more(server, provider, reply):
    faults = {
        "post 1": reply(status=500),
        "post 2": reply(delay_s=4),
        "post 3": reply(hang_up=True),
        "post 4": reply(status=400),
        "post 5": reply(body=b"<html>"),
    }
    server.script = lambda text, n: faults.get(text) or reply(json.dumps({"explanation": f"about {text}"}))
    posts, knowledge = _posts(8), provider(timeout_s=1.5)
    knowledge(posts)
    for post in posts:
        failed = post.text in faults
        assert post.knowledge == (None if failed else f"about {post.text}")
        kinds = [(problem.stage, problem.kind) for problem in post.problems]
        assert kinds == ([("knowledge", ProblemKind.KNOWLEDGE_FAILED)] if failed else [])
        # The others' annotations are complete; this one's is made without what was asked for, and can be made again.
        assert post.status is (Status.DEGRADED if failed else Status.OK)
    assert (knowledge.asked, knowledge.failed) == (8, 5)


def test_every_post_comes_out_whatever_the_server_does_and_nothing_is_asked_twice(server, provider, reply):
    """Each answer is paid for once: what failed for good is asked again in the next run, and nothing else."""
    scripts = {
        "sound": [reply('{"explanation": "A band."}')],
        "broken": [reply('Sure! {"explanation": "A band.", ')],
        "empty": [reply("")],
        "busy": [reply(status=429, headers={"Retry-After": "0"}), reply('{"explanation": "A band."}')],
        "ill": [reply(status=500), reply('{"explanation": "A band."}')],
        "slow": [reply(delay_s=3), reply('{"explanation": "A band."}')],
        "always busy": [reply(status=429)] * 2,
        "always ill": [reply(status=500)] * 2,
        "always slow": [reply(delay_s=3)] * 2,
    }
    texts = [*scripts, *scripts]  # each is reposted
    server.script = lambda text, n: (*scripts[text], *[reply('{"explanation": "Late."}')] * 9)[n]
    first, second = provider(timeout_s=1.5), provider(timeout_s=1.5)

    posts = first([Post(str(number), text) for number, text in enumerate(texts)])
    assert [post.text for post in posts] == texts
    known = {post.text: post.knowledge for post in posts}
    assert known == {text: None if text == "empty" or text.startswith("always") else "A band." for text in scripts}
    assert {post.text for post in posts if post.problems} == {"always busy", "always ill", "always slow"}
    assert all(post.status is (Status.DEGRADED if post.problems else Status.OK) for post in posts)
    assert (first.asked, first.repaired, first.failed) == (9, 1, 3)
    assert {text: len(times) for text, times in server.asked.items()} == {
        text: len(script) for text, script in scripts.items()
    }

    posts = second([Post(str(number), text) for number, text in enumerate(texts)])
    assert {post.knowledge for post in posts if post.text.startswith("always")} == {"Late."}
    assert (second.asked, second.from_cache, second.failed) == (3, 12, 0)
    assert sum(map(len, server.asked.values())) == 15 + 3


def test_failures_are_asked_again_in_the_next_run(server, provider, reply):
    server.script = lambda text, n: reply(status=400) if n == 0 else reply()
    first, second = _posts(1), _posts(1)
    provider()(first)
    provider()(second)
    assert (first[0].knowledge, second[0].knowledge) == (None, "fine")


def test_broken_json_is_repaired_and_counted(server, provider, reply):
    server.script = lambda text, n: reply('{"explanation": "A band.",}' if text == "post 0" else '{"explanation": "x"}')
    posts, knowledge = _posts(3), provider()
    knowledge(posts)
    assert [post.knowledge for post in posts] == ["A band.", "x", "x"]
    assert (knowledge.repaired, knowledge.failed) == (1, 0)


@pytest.mark.parametrize("content", ["", None, '{"explanation": ""}', '{"explanation": null}'])
def test_an_empty_answer_is_no_failure_and_is_not_asked_for_again(server, provider, reply, content):
    server.script = lambda text, n: reply(content)
    for _ in range(2):
        (post,) = provider()(_posts(1))
        assert post.knowledge is None
        assert post.problems == []
    assert len(server.requests) == 1


def test_answers_are_kept_as_they_come(server, provider, reply, monkeypatch):
    """A run that is killed in the middle of a batch has not paid in vain."""
    server.script = lambda text, n: reply(delay_s=0.05)
    put, kept = AnswerCache.put, []

    def put_two_then_die(self, value, *key):
        put(self, value, *key)
        kept.append(key)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(AnswerCache, "put", put_two_then_die)
        with pytest.raises(KeyboardInterrupt):
            provider(concurrency=1)(_posts(6))
    again = provider()
    again(_posts(6))
    assert (again.from_cache, again.asked) == (2, 4)


def test_captions_are_made_and_used_in_the_question(server, explainer_config, captioning, captioner):
    post = Post("1", "hello", image_bytes=_png(77))
    captioning(Explainer(explainer_config()))([post])
    assert (post.caption, post.knowledge) == ("mean 77", "about hello")
    assert "caption: mean 77." in server.requests[0]["messages"][-1]["content"]
    assert captioner.shown[0].shape == (8, 8, 3)


def test_a_caption_that_a_post_brings_saves_its_image_from_being_loaded(captioning, captioner):
    post = Post("1", "hello", caption="brought", image_bytes=_png(77))
    captioning()([post])
    assert (post.caption, post.image, captioner.shown) == ("brought", None, [])


def test_equal_images_are_captioned_once_and_never_again(captioning, captioner, tmp_path):
    (tmp_path / "file.png").write_bytes(_png(30))

    def posts():
        return [
            Post("1", "a", image_bytes=_png(10)),
            Post("2", "b", image_bytes=_png(20)),
            Post("3", "c", image_bytes=_png(10)),
            Post("4", "d", image_uri="file.png"),
            Post("5", "e", image_bytes=_png(0)),
        ]

    for _ in range(2):
        captions = [post.caption for post in captioning()(posts())]
        assert captions == ["mean 10", "mean 20", "mean 10", "mean 30", None]
    assert len(captioner.shown) == 4


def test_images_that_are_fetched_for_captions_are_counted(captioning, monkeypatch):
    monkeypatch.setattr("gem_ray.data.fetch.Fetcher.fetch", _counted_fetch)
    stage = captioning()
    stage([Post(str(n), "a", image_uri=f"s3://bucket/{n}.png") for n in range(3)])
    assert stage.counts["s3_requests"] == 3
    assert Account(stage_counts={"knowledge": stage.counts, "load_image": {"s3_requests": 2}}).requests == 5


def _counted_fetch(fetcher, uri):
    fetcher.fetched["s3_requests"] += 1
    return _png(10)


def test_an_unusable_image_leaves_its_post_without_caption_and_its_neighbours_alone(captioning):
    posts = [
        Post("1", "a", image_bytes=_png(10)),
        Post("2", "b", image_bytes=b"not an image"),
        Post("3", "c", image_uri="missing.png"),
        Post("4", "d", image_bytes=_png(20)),
    ]
    captioning()(posts)
    assert [post.caption for post in posts] == ["mean 10", None, None, "mean 20"]
    assert [len(post.problems) for post in posts] == [0, 1, 1, 0]
    assert posts[1].problems[0].kind is ProblemKind.IMAGE_UNREADABLE


def test_a_post_with_an_unusable_image_is_still_explained(server, explainer_config, captioning):
    post = Post("1", "hello", image_bytes=b"not an image")
    captioning(Explainer(explainer_config()))([post])
    assert post.knowledge == "about hello"
    assert "caption" not in server.requests[0]["messages"][-1]["content"]
