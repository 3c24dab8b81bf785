from itertools import pairwise, product
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from gem_ray.data.tokenize import has_words, tokenize, word_spans

TWITTER10000 = Path(__file__).parents[2].parent / "shared" / "data" / "twitter10000"

TWEETS = [
    ("RT @Marty_Walsh: I don't know", ["RT", "@", "Marty", "_", "Walsh", ":", "I", "don", "'", "t", "know"]),
    ("It’s 3:11pm #CFC", ["It", "’", "s", "3", ":", "11pm", "#", "CFC"]),
    ("Terrorists &amp; VIPs", ["Terrorists", "&amp", ";", "VIPs"]),
    ("I &lt;3 #R&amp;B &#x27;", ["I", "&lt", ";", "3", "#", "R", "&amp", ";", "B", "&#x27", ";"]),
    ("City... http://t.co/RdsxE7efDz #CFC", ["City", ".", ".", ".", "http://t.", "co/RdsxE7efDz", "#", "CFC"]),
    ("see https://example.org/a?b=c.", ["see", "https://example.org/a?b=c", "."]),
    ("07.05.16 cost $16.99 (13.5%)", ["07.05", ".", "16", "cost", "$", "16.99", "(", "13.5", "%", ")"]),
    ("wi-fi in 2013/14 -- again", ["wi-fi", "in", "2013/14", "--", "again"]),
    ("Good Morning :) Wake up!!", ["Good", "Morning", ":)", "Wake", "up", "!", "!"]),
    ("love ❤️🇺🇸", ["love", "❤", "\ufe0f", "🇺", "🇸"]),
    ("👩🏽‍🚀🏳️‍🌈", ["👩", "🏽", "\u200d", "🚀", "🏳", "\ufe0f", "\u200d", "🌈"]),  # as in the data: a word a code point
    ("हिन्दी e\u0301te\u0301", ["हिन्दी", "e\u0301te\u0301"]),
    ("東京タワーで", ["東", "京", "タ", "ワ", "ー", "で"]),
    ("𝐕𝐞𝐱𝐥𝐞𝐲 ＬＹＯＮ Ⓥⓔⓧ 🅅🄴🄻", ["𝐕𝐞𝐱𝐥𝐞𝐲", "ＬＹＯＮ", "Ⓥⓔⓧ", "🅅🄴🄻"]),
    ("a\x1cb  \n\t ", ["a", "b"]),
]


@given(st.text(st.sampled_from("a1 \n\x1c\u200b\ufeff\u200d\u0301-#é東Ⓥ") | st.characters(), max_size=8))
def test_whether_there_are_words_is_known_without_cutting_them(text):
    assert has_words(text) == bool(tokenize(text))


def test_a_text_of_any_length_has_words_at_once():
    assert has_words("a" * 2**26)  # cut into words, this would take all memory


@pytest.mark.parametrize(("text", "tokens"), TWEETS)
def test_words_of_tweets(text, tokens):
    assert tokenize(text) == tokens


INVISIBLE = "\u00ad\u034f\u061c\u180e\u200b\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufeff"
WITHOUT_INVISIBLE = str.maketrans("", "", INVISIBLE + "\u202b\u202c\u202d\u2061\u2062\u2063\u2067\u2068")


@given(st.text() | st.text(st.sampled_from(f"ab-/.1é 東{INVISIBLE}")))
def test_words_are_all_of_the_text_but_white_space_and_what_is_invisible(text):
    tokens = tokenize(text)
    assert all(token.strip() for token in tokens)
    visible = text.translate(WITHOUT_INVISIBLE)
    assert "".join("".join(tokens).translate(WITHOUT_INVISIBLE).split()) == "".join(visible.split())


@given(st.lists(st.sampled_from(["Vexley", "Lyon", "wi-fi", "éa"]), min_size=1), st.data())
def test_invisible_characters_neither_split_words_nor_are_words(words, data):
    mark = st.sampled_from(["", *INVISIBLE])
    marked = ["".join(letter + data.draw(mark) for letter in word) for word in words]
    tokens = tokenize(data.draw(mark) + " ".join(marked))
    assert [token.translate(WITHOUT_INVISIBLE) for token in tokens] == words
    assert [token.rstrip(INVISIBLE) for token in tokens] == [word.rstrip(INVISIBLE) for word in marked]


@given(st.text())
def test_spans_of_the_tokenizers_own_words_cut_them_out_again(text):
    tokens = tokenize(text)
    spans = word_spans(text, tokens)
    assert [text[start:end] for start, end in spans] == tokens
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@given(st.lists(st.tuples(st.text(" \t\n.,-x", max_size=3), st.text("abx .😂", min_size=1).filter(str.strip))))
def test_spans_are_found_whatever_lies_between_the_words(pairs):
    text = "".join(gap + token for gap, token in pairs)
    tokens = [token for _, token in pairs]
    spans = word_spans(text, tokens)
    assert [text[start:end] for start, end in spans] == tokens
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


@pytest.mark.parametrize(
    ("text", "tokens", "starts"),
    [
        ("@ParisHilton in Paris", ["in", "Paris"], [13, 16]),
        ("@ParisHilton loves Paris!", ["Paris", "!"], [19, 24]),
        ("see http://t.co/in in Lyon", ["see", "in", "Lyon"], [0, 19, 22]),
        ("his: is this", ["is", "this"], [5, 8]),
        ("#Paris is in #France", ["Paris", "is", "in", "France"], [1, 7, 10, 14]),
    ],
)
def test_words_that_tokens_leave_out_hold_no_token(text, tokens, starts):
    assert [start for start, _ in word_spans(text, tokens)] == starts


def cuts(text, spans):
    """How often an end of a span has a visible character beside it that is in no span."""
    covered = {place for span in spans for place in range(*span)}
    beside = {(start - 1, start) for start, _ in spans} | {(end, end - 1) for _, end in spans}
    return sum(0 <= place < len(text) and place not in covered and text[place] != " " for place, _ in beside)


@given(st.text("ab @", max_size=10), st.lists(st.sampled_from(["a", "b", "ab", "aa", "@", "a b"]), max_size=3))
def test_no_other_spans_cut_fewer_words(text, tokens):
    starts = product(*([n for n in range(len(text)) if text.startswith(token, n)] for token in tokens))
    each = [[(start, start + len(token)) for start, token in zip(chosen, tokens, strict=True)] for chosen in starts]
    possible = [spans for spans in each if all(end <= start for (_, end), (start, _) in pairwise(spans))]
    if possible:
        assert cuts(text, word_spans(text, tokens)) == min(cuts(text, spans) for spans in possible)
    else:
        with pytest.raises(ValueError, match="does not occur"):
            word_spans(text, tokens)


def test_a_text_of_one_word_again_and_again_takes_no_time():
    assert word_spans("a " * 5000, ["a"] * 2500)[-1] == (4998, 4999)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["b", "a"], "token 1, 'a', does not occur"),
        (["a", "a"], "token 1, 'a', does not occur"),
        (["a", ""], "token 1 is empty"),
        (["a", " "], "token 1 is empty"),
        (["A"], "token 0, 'A', does not occur"),
    ],
)
def test_tokens_that_do_not_occur_in_order_are_refused(tokens, message):
    with pytest.raises(ValueError, match=message):
        word_spans("a b", tokens)


def as_written(tokens: list[str]) -> str:
    """The tweet as its author may have typed it: with a space only where one belongs."""
    text = " ".join(tokens)
    for pattern, replacement in [
        (r"(?<=https?://t\.) (?=co/)", ""),
        (r"([#@]) (?=\w)", r"\1"),
        (r" ?\b_\b ?| _\b|\b_ ", "_"),
        (r" (&\w+) ;", r" \1;"),
        (r"(\w) (['’]) (\w)", r"\1\2\3"),
        (r" ([.,!?;:…%)\]])", r"\1"),
        (r"([(\[$]) ", r"\1"),
    ]:
        text = regex.sub(pattern, replacement, text)
    return text


@pytest.mark.skipif(not TWITTER10000.is_dir(), reason="needs ../shared/data/twitter10000")
@pytest.mark.parametrize("join", [" ".join, as_written])
def test_the_annotators_words_are_found_again_in_texts_as_people_write_them(join):
    posts = (TWITTER10000 / "txt" / "dev.txt").read_text(encoding="utf-8").strip().split("\n\n")
    words = [[line.split("\t")[0] for line in post.split("\n")[1:]] for post in posts]
    agreeing = sum(tokenize(join(tokens)) == tokens for tokens in words)
    assert agreeing / len(words) > 0.95
