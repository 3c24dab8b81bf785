"""From a run to a review, through an export to gold and to a certificate."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from gem_ray.cli import app
from gem_ray.config import ConfigError
from gem_ray.data.shards import read_labelled, write_posts
from gem_ray.evaluation.metrics import evaluate
from gem_ray.evaluation.rules import EvaluationError
from gem_ray.records import Box, Post
from gem_ray.review.certificate import Claim, certify, write_certificate
from gem_ray.review.changes import compare_runs
from gem_ray.review.corrections import UNSEEN, read_corrections
from gem_ray.review.folder import read_review
from gem_ray.review.gold import write_gold
from gem_ray.review.page import notes, render_certificate
from gem_ray.review.population import read_population
from gem_ray.review.sample import continue_sample, sample_for_certificate, sample_for_training
from gem_ray.taxonomy import FMNERG


@pytest.fixture(scope="session")
def review(review_path):
    return read_review(review_path)


@pytest.fixture(scope="session")
def tasks(review_path):
    return json.loads((review_path / "tasks.json").read_text(encoding="utf-8"))


def checked(task, result=None, **facts):
    """The task with an annotation: as predicted, or as given."""
    predicted = task["predictions"][0]["result"] if task["predictions"] else []
    return task | {"id": 1, "annotations": [{"result": predicted if result is None else result, **facts}]}


def unchecked(task):
    return task | {"id": 1, "annotations": []}


@pytest.fixture
def export(tmp_path):
    def write(tasks):
        (tmp_path / "export.json").write_text(json.dumps(tasks), encoding="utf-8")
        return tmp_path / "export.json"

    return write


def result_of(task):
    return json.loads(json.dumps(task["predictions"][0]["result"]))


def region(start, end, text, fine="city", name="new"):
    value = {"start": start, "end": end, "text": text[start:end], "labels": [fine]}
    return {"id": name, "from_name": "entity", "to_name": "text", "type": "labels", "value": value}


# ---- samples


def test_a_population_is_what_its_posts_say(run, posts):
    population = read_population(run)
    assert population.row_ids.tolist() == [post.row_id for post in posts]
    assert population.mentions.tolist() == [len(post.entities) for post in posts]
    assert population.words.tolist() == [len(post.tokens) for post in posts]
    expected = [sum(entity.score for entity in post.entities) for post in posts]
    assert population.auxiliary[:, 0] == pytest.approx(expected)
    assert [population.categories[code] for code in population.category] == [e.fine for p in posts for e in p.entities]
    rest = population.without([posts[0].row_id, posts[39].row_id])
    assert rest.row_ids.tolist() == [post.row_id for post in posts[1:39]]
    assert rest.auxiliary[:, 0] == pytest.approx(expected[1:39])


def test_a_post_of_one_word_belongs_to_the_population_and_one_of_none_does_not(tmp_path, write_run):
    posts = [Post("word", "Lyon", row_id=0), Post("blank", " \n", row_id=1)]
    population = read_population(write_run(tmp_path / "run", posts))
    assert (population.row_ids.tolist(), population.words.tolist(), population.empty) == ([0], [1], 1)


def test_a_calibrated_confidence_is_preferred_to_the_score(tmp_path, posts, run, write_run):
    calibrated = [replace(post, entities=[replace(e, confidence=0.25) for e in post.entities]) for post in posts]
    population = read_population(write_run(tmp_path / "run", calibrated))
    assert set(population.confidence.tolist()) == {0.25}


def test_a_review_continues_an_earlier_one(run, review, tmp_path):
    sample_for_certificate(run, tmp_path / "first", 24, seed=3)
    tally = continue_sample(run, tmp_path / "second", 35, tmp_path / "first")
    longer = read_review(tmp_path / "second")
    assert tally.posts == 11
    assert [post.row_id for post in longer.posts[:24]] == [post.row_id for post in review.posts]
    tasks = json.loads((tmp_path / "second" / "tasks.json").read_text(encoding="utf-8"))
    assert [task["data"]["row_id"] for task in tasks] == [post.row_id for post in longer.posts[24:]]
    with pytest.raises(ValueError, match="35 posts already"):
        continue_sample(run, tmp_path / "third", 30, tmp_path / "second")
    with pytest.raises(FileExistsError, match="holds a review already"):
        sample_for_certificate(run, tmp_path / "second", 30)


def test_another_run_does_not_continue_a_review(run, posts, tmp_path, write_run):
    sample_for_certificate(run, tmp_path / "first", 24, seed=3)
    other = write_run(tmp_path / "other", [replace(post, row_id=post.row_id + 1) for post in posts])
    with pytest.raises(ValueError, match=r"not what .* was drawn from"):
        continue_sample(other, tmp_path / "second", 30, tmp_path / "first")
    again = write_run(tmp_path / "again", posts, "run-2")  # the same posts in the same order, by models of later
    with pytest.raises(ValueError, match=r"not what .* was drawn from"):
        continue_sample(again, tmp_path / "second", 30, tmp_path / "first")


def test_a_run_that_goes_on_is_sampled_with_its_labels_and_is_told(posts, tmp_path, write_run, export):
    """It has no `run.json` yet, or that of an earlier run."""
    whole = write_run(tmp_path / "run", [replace(post, entities=[]) for post in posts])
    run_id = "20260102T000000-0123abcd"
    facts = tmp_path / "run" / "_run" / run_id
    (facts / "published").mkdir(parents=True)
    (facts / "live.json").write_text("{}")
    (facts / "published" / "g00000.json").write_text(
        json.dumps({"files": [{"name": "part-0.parquet", "rows": 40, "size": 1, "tally": {}}], "replaces": []})
    )
    manifest = {"run_id": run_id, "input": "posts", "models": {}, "config": {"labels": "gmner"}, "files": []}
    (facts / "manifest.json").write_text(json.dumps(manifest))
    tally = sample_for_certificate(whole, tmp_path / "review", 24, seed=3)
    assert tally.remarks["posts so far of a run that is not finished: the sample is of them alone"] == 40
    review = read_review(tmp_path / "review")
    assert (review.facts.run_id, review.facts.labels, review.facts.unfinished) == (run_id, "gmner", True)
    made = [checked(task) for task in json.loads((tmp_path / "review" / "tasks.json").read_text(encoding="utf-8"))]
    assert any("not finished" in note for note in notes(certify(review, read_corrections(export(made), review))))
    (tmp_path / "run" / "_SUCCESS").touch()
    assert set(sample_for_certificate(whole, tmp_path / "later", 24).remarks) == {"posts without an image"}


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"frame": {"posts": 1}, "design": null}'])
def test_a_damaged_review_is_named(run, tmp_path, content):
    sample_for_certificate(run, tmp_path / "review", 24)
    (tmp_path / "review" / "sample.json").write_text(content)
    with pytest.raises(ValueError, match=r"review/sample\.json"):
        read_review(tmp_path / "review")


def test_posts_of_an_earlier_review_are_left_out(run, review, tmp_path):
    sample_for_certificate(run, tmp_path / "next", 16, without=[review.path])
    new = read_review(tmp_path / "next")
    assert new.facts.frame.left_out == 24
    assert not {post.row_id for post in new.posts} & {post.row_id for post in review.posts}
    with pytest.raises(EvaluationError, match="all its posts are in the reviews"):
        sample_for_certificate(run, tmp_path / "none", 1, without=[review.path, tmp_path / "next"])


def test_blind_tasks_have_no_predictions_and_the_review_still_knows_them(run, review, tmp_path):
    sample_for_certificate(run, tmp_path / "first", 24, seed=3, blind=True)
    continue_sample(run, tmp_path / "second", 30, tmp_path / "first")
    for name in ("first", "second"):
        tasks = json.loads((tmp_path / name / "tasks.json").read_text(encoding="utf-8"))
        assert not any(prediction["result"] for task in tasks for prediction in task["predictions"])
    assert read_review(tmp_path / "second").posts[:24] == review.posts


def test_too_small_a_sample_is_refused_before_anybody_works_on_it(run, tmp_path):
    with pytest.raises(ValueError, match="19 checked posts prove nothing: --posts 20"):
        sample_for_certificate(run, tmp_path / "small", 19)
    assert not (tmp_path / "small").exists()


def test_a_run_without_any_text_is_refused(tmp_path, write_run):
    blank = [Post(f"p{number}", " \n", row_id=number) for number in range(3)]
    with pytest.raises(EvaluationError, match="none of its 3 posts has a text"):
        sample_for_certificate(write_run(tmp_path / "run", blank), tmp_path / "review", 20)


# ---- what teaches


def test_posts_for_training_are_uncertain_rare_and_no_two_alike(tmp_path, posts, write_run):
    """Twenty copies of one uncertain post, sure ones, and one uncertain post of a rare category."""
    sure = [replace(p, entities=[replace(e, score=0.99) for e in p.entities]) for p in posts if p.entities][:15]
    template = posts[0]
    unsure = [replace(e, score=0.3) for e in template.entities]
    copies = [
        replace(template, post_id=f"copy-{n}", text=template.text + f" {n}", entities=unsure, row_id=10**12 + n)
        for n in range(20)
    ]
    rare = replace(
        posts[1], post_id="rare", row_id=10**13, text="A medal for Zoë of Ghent , nobody else came",
        tokens=["A", "medal", "for", "Zoë", "of", "Ghent", ",", "nobody", "else", "came"],
    )  # fmt: skip
    rare.entities = [replace(posts[1].entities[0], fine="award", coarse="other", score=0.3)]
    run = write_run(tmp_path / "run", [*sure, *copies, rare])
    sample_for_training(run, tmp_path / "review", 5)
    chosen = [post.post_id for post in read_review(tmp_path / "review").posts]
    assert "rare" in chosen[:2]
    assert sum(post_id.startswith("copy") for post_id in chosen) == 1
    with pytest.raises(ValueError, match="chosen to teach"):
        certify(read_review(tmp_path / "review"), None)


# ---- corrections


def test_rows_not_ids_say_which_post_a_task_is(review, tasks, export):
    """`post-1` stands twice in the sample."""
    twice = [number for number, post in enumerate(review.posts) if post.post_id == "post-1"]
    assert len(twice) == 2
    changed = [checked(task) for task in tasks]
    changed[twice[1]]["annotations"][0]["result"] = []
    corrections = read_corrections(export(changed), review)
    golds = [corrections.posts[review.posts[number].row_id].gold for number in twice]
    assert (len(golds[0]), golds[1]) == (2, [])


def test_the_last_annotation_counts_and_skipped_ones_do_not(review, tasks, export):
    task = tasks[0]
    late = {"result": [], "updated_at": "2026-01-02T00:00:00Z", "id": 1}
    early = {"result": result_of(task), "updated_at": "2026-01-01T00:00:00Z", "id": 2}
    row = task["data"]["row_id"]
    both = read_corrections(export([task | {"annotations": [late, early]}]), review)
    assert both.posts[row].gold == []
    assert both.remarks == {"posts checked more than once, of which the last check counts": 1}
    skipped = read_corrections(export([task | {"annotations": [late | {"was_cancelled": True}, early]}]), review)
    assert len(skipped.posts[row].gold) == 2
    truth = read_corrections(export([task | {"annotations": [late, early | {"ground_truth": True}]}]), review)
    assert len(truth.posts[row].gold) == 2
    twice = [task | {"annotations": [early]}, task | {"annotations": [late]}]
    assert read_corrections(export(twice), review).posts[row].gold == []
    assert read_corrections(export(twice[::-1]), review).posts[row].gold == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: [region(0, 1, text, "town")], "which is not a category of fmnerg"),
        (lambda text: [region(text.index(" "), text.index(" ") + 1, text)], "holds no word"),
        (lambda text: [region(4, 12, text), region(4, 15, text, "song", "b")], "not a category|share words"),
        (lambda text: [region(4, 12, text), region(4, 20, text, "music", "b")], "share words"),
        (lambda text: [region(4, 12, "_" + text)], "not what stands at its characters"),
        (lambda text: [region(4, 12, text) | {"value": {"start": 4, "end": 12, "labels": []}}], "0 categories"),
        (
            lambda text: [
                {"id": "b", "type": "rectanglelabels",
                 "value": {"x": 1, "y": 1, "width": 5, "height": 5, "rectanglelabels": ["city"]}}
            ],
            "related to no span",
        ),
        (
            lambda text: [
                region(4, 12, text),
                {"id": "b", "type": "rectanglelabels", "original_width": 400, "original_height": 200,
                 "value": {"x": 0, "y": 0, "width": 5, "height": 5, "rotation": 180, "rectanglelabels": ["city"]}},
            ],
            "lies beside its image",
        ),
        (lambda text: [{"type": "labels", "value": {"start": 0, "end": 4, "labels": ["city"]}}], "region is broken"),
        (lambda text: [region(4, 12, text) | {"value": {"labels": ["city"]}}], "region is broken.*start"),
        (lambda text: [region(4, 12, text) | {"value": None}], "region is broken"),
    ],
)  # fmt: skip
def test_what_cannot_be_gold_is_named_with_its_task(review, tasks, export, change, message):
    wrong = checked(tasks[0], change(tasks[0]["data"]["text"]))
    with pytest.raises(ValueError, match=f"(?s)mend in Label Studio.*task 1 .post 'post-23'.*({message})"):
        read_corrections(export([wrong, *map(checked, tasks[1:])]), review)


def test_a_span_over_a_line_end_comes_back_as_label_studio_writes_it(review, tasks, export):
    """Its editor (1.23.2, in Chromium) writes the two characters `\\n` for each end of a line in what was marked."""
    text = tasks[0]["data"]["text"]
    marked = region(text.index("waits"), text.index("no 23") + 2, text)
    marked["value"]["text"] = r"waits\n\nno"
    gold = read_corrections(export([checked(tasks[0], [marked])]), review).posts[review.posts[0].row_id].gold
    assert [review.posts[0].tokens[mention.word_start : mention.word_end] for mention in gold] == [["waits", "no"]]


def test_answers_that_are_neither_spans_nor_boxes_are_told(review, tasks, export):
    unclear = {"id": "c", "from_name": "unclear", "type": "choices", "value": {"choices": ["unclear"]}}
    corrections = read_corrections(export([checked(tasks[0], [unclear]), *map(checked, tasks[1:])]), review)
    assert corrections.posts[review.posts[0].row_id].gold == []
    (remark,) = corrections.remarks
    assert "tasks with choices, which are not read" in remark
    made = [checked(task, lead_time=None if number else 4.5) for number, task in enumerate(tasks)]
    assert read_corrections(export(made), review).remarks == {UNSEEN: 23}  # annotations made of predictions


@pytest.mark.parametrize("content", ["{}", "[1]", "", '[{"data": {}}]', '[{"data": {}, "annotations": [{}]}]'])
def test_another_format_is_refused(review, tmp_path, content):
    (tmp_path / "export.json").write_text(content)
    with pytest.raises(ValueError, match="not Label Studio's JSON export"):
        read_corrections(tmp_path / "export.json", review)


def test_tasks_of_another_review_and_texts_that_were_changed_are_refused(review, tasks, export):
    strange = [checked(task | {"data": task["data"] | {"row_id": -number}}) for number, task in enumerate(tasks)]
    with pytest.raises(ValueError, match="no task of the review"):
        read_corrections(export(strange), review)
    others = [checked(task | {"data": task["data"] | {"post_id": "of another run", "text": "x"}}) for task in tasks]
    both = read_corrections(export([*map(checked, tasks), *others]), review)  # two reviews in one project
    assert (len(both.posts), both.remarks) == (24, {"tasks of other posts, passed over": 24})
    other = checked(tasks[0] | {"data": tasks[0]["data"] | {"text": "another"}})
    with pytest.raises(ValueError, match="its text is not the post's"):
        read_corrections(export([other]), review)


def test_a_box_without_a_relation_belongs_to_the_only_span_of_its_category(review, tasks, export):
    result = [part for part in result_of(tasks[0]) if part["type"] != "relation"]
    gold = read_corrections(export([checked(tasks[0], result)]), review).posts[review.posts[0].row_id].gold
    assert [mention.boxes for mention in gold] == [(), (Box(100, 50, 300, 150),)]


def test_a_turned_box_is_the_upright_one_around_it(review, tasks, export):
    result = result_of(tasks[0])
    (box,) = (part for part in result if part["type"] == "rectanglelabels")
    box["value"] |= {"x": 50, "y": 0, "width": 10, "height": 50, "rotation": 90}  # 40 × 100 pixels, to the lower left
    gold = read_corrections(export([checked(tasks[0], result)]), review).posts[review.posts[0].row_id].gold
    (found,) = gold[1].boxes
    assert (found.x1, found.y1, found.x2, found.y2) == pytest.approx((100, 0, 200, 40), abs=1e-6)


def test_mentions_of_one_text_share_their_boxes(review, tasks, export):
    text = tasks[0]["data"]["text"]
    again = region(text.rindex("São Paulo"), text.rindex("São Paulo") + 9, text)
    gold = read_corrections(export([checked(tasks[0], [*result_of(tasks[0]), again])]), review)
    boxes = [mention.boxes for mention in gold.posts[review.posts[0].row_id].gold]
    assert boxes == [(), (Box(100, 50, 300, 150),), (Box(100, 50, 300, 150),)]


# ---- gold


def test_corrections_are_gold_that_training_and_evaluation_read(review, tasks, export, posts, tmp_path):
    corrections = read_corrections(export(list(map(checked, tasks))), review)
    assert write_gold(review, corrections, str(tmp_path / "corrections")) == 24
    labelled = read_labelled(tmp_path / "corrections", FMNERG)
    assert [post.gold for post in labelled] == [corrections.posts[post.row_id].gold for post in review.posts]
    names = {post.row_id: f"{number}" for number, post in enumerate(review.posts)}
    annotated = [replace(post, post_id=names[post.row_id]) for post in review.posts]
    gold = [replace(post, post_id=f"{number}") for number, post in enumerate(labelled)]
    assert evaluate(gold, annotated).mnerg.f1 == 1  # what was predicted was confirmed


def test_images_come_from_the_shards_that_were_annotated(posts, tmp_path, export, write_run):
    """Found by row: all posts have one id."""
    inputs = [replace(post, post_id="same", row_id=n, image_bytes=b"image %d" % n) for n, post in enumerate(posts)]
    write_posts(inputs, tmp_path / "posts")
    sample_for_certificate(write_run(tmp_path / "run", inputs), tmp_path / "review", 20)
    review = read_review(tmp_path / "review")
    made = [checked(task) for task in json.loads((tmp_path / "review" / "tasks.json").read_text(encoding="utf-8"))]
    corrections = read_corrections(export(made), review)
    write_gold(review, corrections, str(tmp_path / "gold"), str(tmp_path / "posts"))
    found = [post.image_bytes for post in read_labelled(tmp_path / "gold", FMNERG)]
    assert found == [b"image %d" % post.row_id for post in review.posts]
    write_posts([replace(post, post_id="other") for post in inputs], tmp_path / "others")
    with pytest.raises(ValueError, match="is 'other', and 'same' in the run"):
        write_gold(review, corrections, str(tmp_path / "none"), str(tmp_path / "others"))


# ---- certificates


def test_a_certificate_without_an_error_is_no_promise_of_perfection(review, tasks, export, tmp_path):
    corrections = read_corrections(export(list(map(checked, tasks))), review)
    certificate = certify(review, corrections, claims=[Claim.parse("mner.f1 >= 0.99")], width=0.05)
    found = certificate.estimates["mner"]["f1"]
    assert found.value == 1
    assert 0.6 < found.low < 0.95  # 24 posts
    assert (certificate.claims[0].holds, certificate.claims[0].posts) == (None, 40)  # all of the run
    assert certificate.posts_for_width["mner"]["f1"] > 24
    write_certificate(certificate, tmp_path)
    facts = json.loads((tmp_path / "certificate.json").read_text())
    assert facts["tasks"]["mner"]["f1"]["low"] == found.low
    assert "mner.f1&gt;=0.99: not settled" in (tmp_path / "certificate.html").read_text()


def test_posts_behind_a_gap_do_not_count(review, tasks, export):
    """Somebody checked the easy ones and left the 22nd."""
    made = [checked(task) for task in tasks]
    made[21] = unchecked(tasks[21])
    certificate = certify(review, read_corrections(export(made), review))
    assert (certificate.checked, certificate.beyond, certificate.first_missing) == (21, 2, review.posts[21].post_id)
    assert any("number 22 of the sample, is not checked" in note for note in notes(certificate))
    assert any("2 checked posts behind it do not count" in note for note in notes(certificate))


@pytest.mark.parametrize(
    ("blind", "said"), [(True, "did not see the predictions"), (False, "saw the predictions, and")]
)
def test_a_certificate_says_whether_the_checkers_saw_the_predictions(review, tasks, export, blind, said):
    shown = replace(review, facts=replace(review.facts, blind=blind))
    certificate = certify(shown, read_corrections(export(list(map(checked, tasks))), shown))
    assert any(said in note for note in notes(certificate))


def test_one_checked_post_is_refused_with_what_is_missing(review, tasks, export):
    made = [checked(tasks[0]), *map(unchecked, tasks[1:2]), *map(checked, tasks[2:])]
    with pytest.raises(ValueError, match=r"1 of the posts are checked: .* at least 20; .* 'post-32', number 2"):
        certify(review, read_corrections(export(made), review))


def test_posts_without_images_leave_regions_uncertified(run, tasks, export, tmp_path):
    sample_for_certificate(run, tmp_path / "review", 24, seed=3)  # without --images
    review = read_review(tmp_path / "review")
    corrections = read_corrections(
        export([checked(task | {"data": task["data"] | {"image": ""}}) for task in tasks]), review
    )
    certificate = certify(review, corrections)
    assert set(certificate.estimates) == {"mner", "span"}
    assert "an image that the checker was not shown: sample with --images" in certificate.left_out["mnerg"]
    with pytest.raises(ValueError, match=r"eeg\.f1>=0\.5 cannot be settled"):
        certify(review, corrections, claims=[Claim.parse("eeg.f1>=.5")])


def test_boxes_over_an_image_that_was_not_shown_are_no_gold(review, tasks, export):
    blind = [checked(task | {"data": task["data"] | {"image": ""}}) for task in tasks]
    seen, unseen = (read_corrections(export(made), review) for made in ([*map(checked, tasks)], blind))
    boxes = [sum(len(gold.boxes) for post in each.posts.values() for gold in post.gold) for each in (seen, unseen)]
    assert boxes[0] > 0
    assert boxes[1] == 0
    told = "posts whose image the checker was not shown: their gold has no boxes, and says nothing of it"
    assert unseen.remarks[told] == sum(bool(post.image_width) for post in unseen.posts.values()) > 0
    assert told not in seen.remarks


def test_a_run_whose_posts_are_all_rejected_has_recall_but_no_precision(posts, tmp_path, export, write_run):
    rejected = [replace(post, entities=[], problems=posts[12].problems, image_width=None) for post in posts]
    run = write_run(tmp_path / "run", rejected)
    sample_for_certificate(run, tmp_path / "review", 30)
    review = read_review(tmp_path / "review")
    tasks = json.loads((tmp_path / "review" / "tasks.json").read_text(encoding="utf-8"))
    result = [[region(4, 8, task["data"]["text"])] for task in tasks]
    corrections = read_corrections(export([checked(*each) for each in zip(tasks, result, strict=True)]), review)
    certificate = certify(review, corrections)
    measures = {measure: found.value for measure, found in certificate.estimates["mner"].items()}
    assert measures == {"precision": None, "recall": 0, "f1": 0}
    assert ">–</td>" in render_certificate(certificate)


@pytest.mark.parametrize("text", ["mner>=0.5", "mner.f1>0.5", "mner.f1>=50", "ner.f1>=0.5", "mner.f1>=1.5"])
def test_a_claim_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="--claim takes TASK"):
        Claim.parse(text)


def test_a_page_escapes_what_posts_hold(review, tasks, export, posts, tmp_path, write_run):
    hostile = [replace(post, post_id=f"<script>{number}") for number, post in enumerate(posts)]
    sample_for_certificate(write_run(tmp_path / "run", hostile), tmp_path / "review", 24, seed=3)
    hostile_review = read_review(tmp_path / "review")
    made = [checked(task) for task in json.loads((tmp_path / "review" / "tasks.json").read_text(encoding="utf-8"))]
    made[22]["annotations"] = []
    page = render_certificate(certify(hostile_review, read_corrections(export(made), hostile_review)))
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


# ---- commands


def test_the_commands_say_what_they_wrote(run, tasks, export, tmp_path):
    def gem_ray(*arguments):
        result = CliRunner().invoke(app, ["review", *map(str, arguments)])
        return result.output if result.exception is None else result.exception

    review, file = tmp_path / "review", export(list(map(checked, tasks)))
    assert "tasks.json: 24 tasks, 42 entities" in gem_ray("sample", run, review, "--posts", 24, "--seed", 3)
    assert "24 posts with 42 gold mentions" in gem_ray("read", review, file, tmp_path / "gold")
    said = gem_ray("certify", review, file, tmp_path / "out", "--claim", "mner.f1>=0.5", "--width", 0.02)
    assert "24 checked posts of 24, for 40 posts" in said
    assert "mner.f1>=0.5: yes, and no further checks are needed" in said
    assert (tmp_path / "out" / "certificate.html").exists()
    assert "3 tasks" in gem_ray("sample", run, tmp_path / "teach", "--for", "training", "--posts", 3)
    for options in (("--without", review), ("--blind",), ("--for", "training")):
        assert isinstance(gem_ray("sample", run, tmp_path / "no", "--after", review, *options), ConfigError)


# ---- a second run


def test_what_a_second_run_changed_is_counted_by_row(run, posts, tmp_path, write_run, review, tasks, export):
    second = []
    for number, post in enumerate(posts):
        entities = [replace(entity) for entity in post.entities]
        if number == 0:
            entities[0].fine = "artist"
        if number == 1:
            entities = entities[:1]
        if number == 3:
            entities[1].box = None
        second.append(replace(post, entities=entities))
    second[5].entities.append(replace(posts[5].entities[0], start=0, end=3, word_start=0, word_end=1))
    other = write_run(tmp_path / "second", second[:-1], "run-2")
    changes = compare_runs(run, other)
    assert (changes.rows, changes.only_first, changes.only_second, changes.posts) == (39, 1, 0, 4)
    assert (changes.added, changes.removed, changes.recategorised, changes.boxes) == (1, 1, 1, 1)
    assert changes.moves == [("intellectual", "artist", 1)]
    corrections = read_corrections(export(list(map(checked, tasks))), review)
    with pytest.raises(ValueError, match="lacks 1 checked post: it is not a run over the same posts"):
        certify(review, corrections, against=other)
    whole = write_run(tmp_path / "whole", second, "run-3")
    certificate = certify(review, corrections, against=whole)
    assert certificate.differences["mner"]["f1"].value < 0  # the first run was confirmed in everything
    assert "looks better" in " ".join(notes(certificate))
    assert "intellectual → artist" in render_certificate(certificate)
    stranger = write_run(tmp_path / "stranger", [replace(post, row_id=post.row_id + 1) for post in posts])
    with pytest.raises(EvaluationError, match="no row in common"):
        compare_runs(run, stranger)
