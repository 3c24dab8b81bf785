import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer, BlipForImageTextRetrieval, BlipImageProcessorPil

from gem_ray.config import parse_config
from gem_ray.grounding.matcher import ImageProcessor, Matcher, MatchQuery, TextProcessor

QUERIES = [
    MatchQuery(2, "Cleveland", "sports_team"),
    MatchQuery(0, "The Edge of the Sea", "written_work"),
    MatchQuery(2, "a long unknown name 東京 🙂", "person_other"),
    MatchQuery(1, "", "city"),
    MatchQuery(0, "x", "city"),
]


def load(folder: Path, **settings) -> Matcher:
    return Matcher.from_config(parse_config({"grounder": {"matcher": {"model": str(folder), **settings}}}))


def random_images(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, size=(*size, 3), dtype=np.uint8) for size in sizes]


IMAGES = random_images([(60, 40), (33, 90), (1, 1)])


def test_query_is_written_as_in_table_8():
    assert MatchQuery(0, "Cleveland", "sports_team").text == "Cleveland is belong sports_team."


def test_probability_is_that_of_the_whole_model(random_blip):
    model = BlipForImageTextRetrieval.from_pretrained(random_blip).eval()
    tokenizer = AutoTokenizer.from_pretrained(random_blip)
    processor = BlipImageProcessorPil.from_pretrained(random_blip)
    for query, match in zip(QUERIES, load(random_blip).match(IMAGES, QUERIES), strict=True):
        encoded = tokenizer(query.text, return_tensors="pt")
        encoded["input_ids"][0, 0] = tokenizer.convert_tokens_to_ids("[ENC]")
        pixels = processor(IMAGES[query.image], input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            score = model(encoded["input_ids"], pixels, attention_mask=encoded["attention_mask"]).itm_score
        assert match.probability == pytest.approx(float(score.softmax(dim=-1)[0, 1]), abs=1e-5)


def test_each_image_is_encoded_once_whatever_is_asked_of_it(random_blip):
    matcher = load(random_blip, batch_size=2, image_batch_size=2)
    encoded = []
    matcher.model.vision_model.embeddings.register_forward_hook(lambda _m, inputs, _o: encoded.append(len(inputs[0])))
    matcher.match(IMAGES, QUERIES * 3)
    assert encoded == [2, 1]


def test_no_query_needs_no_image(random_blip):
    matcher = load(random_blip)
    matcher.model.vision_model.embeddings.register_forward_hook(lambda *_: pytest.fail("an image was encoded"))
    assert matcher.match(IMAGES, []) == []


def test_answers_do_not_depend_on_the_batch(random_blip):
    together = load(random_blip, batch_size=5).match(IMAGES, QUERIES)
    matcher = load(random_blip)
    for query, match in zip(QUERIES, together, strict=True):
        (alone,) = matcher.match([IMAGES[query.image]], [MatchQuery(0, query.entity, query.category)])
        assert match.probability == pytest.approx(alone.probability, abs=1e-5)
        np.testing.assert_allclose(match.map, alone.map, atol=1e-5 * alone.map.max())


def test_text_begins_with_enc_and_only_names_and_template_are_inner(random_blip):
    matcher = load(random_blip)
    batch = matcher.texts(
        [MatchQuery(0, "Cleveland", "city"), MatchQuery(0, "The Edge of the Sea", "written_work")], torch.device("cpu")
    )
    tokens = matcher.texts.tokenizer.convert_ids_to_tokens(batch.input_ids[0].tolist())
    assert tokens[0] == "[ENC]"
    assert tokens[-1] == "[PAD]"
    inner = [token for token, is_inner in zip(tokens, batch.inner[0].tolist(), strict=True) if is_inner]
    assert inner[0] == "cleveland"
    assert inner[-1] == "."
    assert not {"[ENC]", "[SEP]", "[PAD]"} & set(inner)
    tokens = matcher.texts.tokenizer.convert_ids_to_tokens(batch.input_ids[1].tolist())
    words = [token for token, is_word in zip(tokens, batch.words[1].tolist(), strict=True) if is_word]
    assert words == ["the", "edge", "of", "the", "sea"]


def test_an_entity_without_tokens_of_its_own_counts_by_its_category(random_blip):
    batch = load(random_blip).texts([MatchQuery(0, "\u200d", "city")], torch.device("cpu"))
    assert batch.words.any()
    assert torch.equal(batch.words, batch.inner)


def test_published_tokenizers_without_enc_get_it_where_the_model_has_it():
    # bert-base-uncased has 30,522 tokens; BLIP's embedding has two more: [DEC] and [ENC].
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    vocabulary = words | {f"word{index}": index for index in range(5, 30_522)}
    texts = TextProcessor(BertTokenizer(vocab=vocabulary), vocab_size=30_524)
    assert texts([MatchQuery(0, "word5", "word6")], torch.device("cpu")).input_ids.tolist() == [
        [30_523, 5, 1, 1, 6, 1, 3]
    ]


def test_a_model_without_an_embedding_for_enc_is_refused():
    with pytest.raises(ValueError, match=r"none for \[ENC\]"):
        TextProcessor(BertTokenizer(), vocab_size=5)


def test_very_long_names_are_cut(random_blip):
    (match,) = load(random_blip).match(IMAGES[:1], [MatchQuery(0, "Cleveland " * 400, "city")])
    assert np.isfinite(match.map).all()


def test_image_size_and_normalisation_come_from_the_model_directory(tmp_path):
    values = {"size": {"height": 48, "width": 48}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    images = random_images([(20, 31), (200, 3), (48, 48)])
    expected = BlipImageProcessorPil(**values)(images, input_data_format="channels_last", return_tensors="pt")
    torch.testing.assert_close(
        ImageProcessor.from_pretrained(tmp_path)(images), expected["pixel_values"], atol=1e-5, rtol=1e-5
    )


def test_a_layer_that_is_not_there_is_refused(random_blip):
    with pytest.raises(ValueError, match="layers 0 to 3"):
        load(random_blip, layer=4)


def test_half_precision_gives_nearly_the_same(random_blip):
    full, half = (load(random_blip, dtype=dtype).match(IMAGES, QUERIES) for dtype in ("float32", "bfloat16"))
    for one, other in zip(full, half, strict=True):
        assert other.probability == pytest.approx(one.probability, abs=0.1)
        assert other.map.dtype == np.float32
