"""The input format: first subwords, room for knowledge, long texts, words that a tokenizer makes nothing of."""

from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer, RobertaTokenizer

from gem_ray.records import Post
from gem_ray.tagger.checkpoint import load_encoder
from gem_ray.tagger.features import SubwordEncoder, by_token_budget, collate, encoder_form, fit, load_tokenizer

ZERO_WIDTH = "\u200b"


def make(text: str, knowledge: str | None = None) -> Post:
    return Post("p", text, tokens=text.split(" "), knowledge=knowledge)


def pieces(features: SubwordEncoder, ids: list[int]) -> str:
    return " ".join(features.tokenizer.convert_ids_to_tokens(ids))


def test_text_then_knowledge_between_separators(features: SubwordEncoder) -> None:
    (window,) = features.encode([make("taylor visits nyork", "singer of paris")])
    assert pieces(features, window.input_ids) == ("[CLS] taylor visits ny ##ork [SEP] singer of paris [SEP]")


def test_a_tokenizer_knows_for_how_many_subwords_the_encoder_has_positions(encoder_folder: Path) -> None:
    tokenizer, encoder = load_tokenizer(encoder_folder), load_encoder(str(encoder_folder))
    for padding, length in ((None, 64), (1, 62)):  # RoBERTa counts from the position past its padding's
        encoder.embeddings.position_embeddings.padding_idx = padding
        tokenizer.model_max_length = 10**30  # as published ones that do not say it
        assert fit(tokenizer, encoder, encoder_folder).model_max_length == length


def test_a_word_is_its_first_subword(features: SubwordEncoder) -> None:
    (window,) = features.encode([make("Tweets nyork said : singers")])
    assert pieces(features, [window.input_ids[position] for position in window.first_subwords]) == (
        "tweet ny said : singer"
    )


def test_alignment_is_the_tokenizers_own(features: SubwordEncoder, encoder_folder: Path, posts: list[Post]) -> None:
    reference = AutoTokenizer.from_pretrained(encoder_folder)
    for post, window in zip(posts, features.encode(posts), strict=True):
        word_ids = reference(post.tokens, is_split_into_words=True).word_ids()
        assert window.first_subwords == [word_ids.index(word) for word in range(len(post.tokens))]


def test_words_without_subwords_keep_a_place(features: SubwordEncoder) -> None:
    post = Post("p", "", tokens=[ZERO_WIDTH, "london", ZERO_WIDTH, ZERO_WIDTH, "paris", "\ufe0f"])
    (window,) = features.encode([post])
    read = pieces(features, [window.input_ids[position] for position in window.first_subwords])
    assert read == "[UNK] london [UNK] [UNK] paris [UNK]"


def test_knowledge_is_cut_and_the_text_is_not(encoder_folder: Path) -> None:
    features = SubwordEncoder(load_tokenizer(encoder_folder), max_length=10)
    (window,) = features.encode([make("the singer said in london", "paris " * 30)])
    assert pieces(features, window.input_ids) == ("[CLS] the singer said in london [SEP] paris paris [SEP]")
    (full,) = features.encode([make("the singer said in london from paris and", "paris " * 30)])
    assert pieces(features, full.input_ids) == "[CLS] the singer said in london from paris and [SEP]"


@pytest.mark.parametrize("word", ["paris ", "antidisestablishmentarianism ", "\u200b"])
def test_no_more_knowledge_is_tokenised_than_can_be_read(encoder_folder: Path, word: str) -> None:
    features = SubwordEncoder(load_tokenizer(encoder_folder), max_length=10)
    given: list[str] = []
    tokenizer = features.tokenizer
    features.tokenizer = lambda texts, **options: given.extend(texts) or tokenizer(texts, **options)  # type: ignore
    (much,) = features.subwords([make("the singer", word * 1_000_000)])
    assert max(map(len, given)) <= 1000
    assert much == features.subwords([make("the singer", word * 500)])[0]


def test_a_text_longer_than_the_input_is_read_in_windows_of_whole_words(encoder_folder: Path) -> None:
    features = SubwordEncoder(load_tokenizer(encoder_folder), max_length=6)
    post = make("the singers nyork said tweets in london from tweetingerssssss")
    windows = features.encode([post])
    assert all(len(window.input_ids) <= 6 for window in windows)
    spans = [(window.word_start, window.word_end) for window in windows]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == len(post.tokens)
    first = [window.input_ids[position] for window in windows for position in window.first_subwords]
    assert pieces(features, first) == "the singer ny said tweet in london from tweet"


def test_posts_without_words_have_no_window(features: SubwordEncoder) -> None:
    posts = [Post("a", ""), make("london"), Post("b", "", knowledge="paris")]
    assert [window.post for window in features.encode(posts)] == [1]
    assert features.encode([]) == []


def test_batches_are_padded_and_masked(features: SubwordEncoder) -> None:
    windows = features.encode([make("london", "paris city"), make("the nyork said")])
    batch = collate(windows, features.tokenizer.pad_token_id)
    assert batch.input_ids.shape == (2, 6)
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert batch.word_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.first_subwords.tolist() == [[1, 0, 0], [1, 2, 4]]
    assert batch.tags is None


@pytest.mark.parametrize("budget", [1, 20, 40, 10_000])
def test_no_batch_holds_more_subwords_than_its_budget(features: SubwordEncoder, posts: list[Post], budget: int) -> None:
    batches = list(by_token_budget(features.encode(posts), budget))
    sizes = [collate(batch, 0).input_ids.numel() for batch in batches]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    assert sorted(window.post for batch in batches for window in batch) == list(range(len(posts)))
    for batch, following in pairwise(batches):  # no room was left
        assert (len(batch) + 1) * len(batch[0].input_ids) > budget
        assert len(following[0].input_ids) <= len(batch[-1].input_ids)


@pytest.mark.parametrize("max_length", [2, 65])
def test_a_length_that_the_encoder_cannot_read_is_refused(encoder_folder: Path, max_length: int) -> None:
    with pytest.raises(ValueError, match="max_length"):
        SubwordEncoder(load_tokenizer(encoder_folder), max_length)


def test_byte_level_tokenizers_see_a_space_before_every_word(tmp_path: Path) -> None:
    """RoBERTa knows ` london` and `london` as different subwords; words of a text are of the first kind."""
    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "Ġ", "i", "n", "Ġi", "Ġin", "in"]
    merges = [("Ġ", "i"), ("Ġi", "n"), ("i", "n")]
    RobertaTokenizer({name: index for index, name in enumerate(names)}, merges).save_pretrained(tmp_path)
    features = SubwordEncoder(load_tokenizer(tmp_path), max_length=16)
    (window,) = features.encode([make("in in", "in")])
    assert pieces(features, window.input_ids[:4]) == "<s> Ġin Ġin </s>"
    assert window.first_subwords == [1, 2]


@pytest.mark.parametrize("styled", ["𝐋𝐲𝐨𝐧", "Ｌｙｏｎ", "Ⓛⓨⓞⓝ", "𝓛𝔂𝓸𝓷"])
def test_styled_letters_are_plain_to_the_encoder_and_signs_stay(styled):
    assert encoder_form(styled) == "Lyon"
    assert [encoder_form(word) for word in ("…", "½", "é", "東", "\u00ad")] == ["…", "½", "é", "東", "\u00ad"]
