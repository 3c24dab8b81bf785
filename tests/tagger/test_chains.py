"""Probabilities of segments against enumeration of all tag sequences, decoded as the evaluation decodes them."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import torch

from gem_ray.tagger.chains import Lattice, segment_probabilities
from gem_ray.tagger.crf import LinearChainCRF
from gem_ray.tagger.softmax import IndependentTags
from gem_ray.taxonomy import bio_tags, decode_bio

CATEGORIES = ("a", "b")
TAGS = bio_tags(CATEGORIES)
CASES = 1000


@cache
def sequences(length: int) -> tuple[np.ndarray, dict[tuple[int, int, int], np.ndarray]]:
    """All tag sequences of a length, and for each segment which of them have it."""
    paths = list(product(range(len(TAGS)), repeat=length))
    members: dict[tuple[int, int, int], list[int]] = {}
    for number, path in enumerate(paths):
        for start, end, name in decode_bio([TAGS[tag] for tag in path]):
            members.setdefault((start, end, CATEGORIES.index(name)), []).append(number)
    return np.array(paths), {segment: np.array(numbers) for segment, numbers in members.items()}


def enumerated(crf: LinearChainCRF | IndependentTags, windows: list[torch.Tensor]) -> np.ndarray:
    """The probability of each of `sequences`: windows are independent of one another."""
    emissions = torch.cat(windows).double().numpy()
    paths = sequences(len(emissions))[0]
    scores = emissions[np.arange(len(emissions)), paths].sum(axis=1)
    if isinstance(crf, LinearChainCRF):
        start, end, moves = (
            p.detach().double().numpy() for p in (crf.start_transitions, crf.end_transitions, crf.transitions)
        )
        first = 0
        for window in windows:
            last = first + len(window) - 1
            scores = scores + start[paths[:, first]] + end[paths[:, last]]
            for word in range(first + 1, last + 1):
                scores = scores + moves[paths[:, word - 1], paths[:, word]]
            first = last + 1
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def lattices(crf: LinearChainCRF | IndependentTags, texts: list[list[torch.Tensor]]) -> list[Lattice]:
    """Of texts in windows, all windows in one padded batch."""
    windows = [window for text in texts for window in text]
    lengths = torch.tensor([len(window) for window in windows])
    emissions = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True, padding_value=7.0)
    with torch.no_grad():
        chains = crf.chains(emissions, torch.arange(emissions.shape[1]) < lengths[:, None])
    rows = iter(zip(windows, *chains, strict=True))
    result = []
    for text in texts:
        parts = []
        for window, prefixes, suffixes, scales in (next(rows) for _ in text):
            length = len(window)
            opens = np.arange(length) == 0
            parts.append(Lattice(*(t[:length].numpy() for t in (window, prefixes, suffixes, scales)), opens))
        result.append(Lattice.joined(parts))
    return result


@pytest.mark.parametrize("with_crf", [True, False])
def test_the_probability_of_every_segment_is_that_of_enumeration(with_crf: bool) -> None:
    generator = np.random.default_rng(0)
    torch.manual_seed(0)
    checked = 0
    while checked < CASES:
        crf = LinearChainCRF(len(TAGS)) if with_crf else IndependentTags()
        for parameter in crf.parameters():
            torch.nn.init.normal_(parameter, std=float(generator.uniform(0.1, 3)))
        spread = float(generator.uniform(0.1, 4))
        texts = [
            [spread * torch.randn(int(length), len(TAGS)) for length in lengths]
            for lengths in ([1], [2], [4], [2, 1], [1, 1, 2], [3, 1], [1, 3])
        ]
        segments = [list(sequences(sum(map(len, text)))[1]) for text in texts]
        transitions = crf.transitions.detach().numpy()
        found = segment_probabilities(lattices(crf, texts), segments, transitions)
        for text, places, probabilities in zip(texts, segments, found, strict=True):
            exact, members = enumerated(crf, text), sequences(sum(map(len, text)))[1]
            expected = [exact[members[place]].sum() for place in places]
            np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-7)
            checked += 1


def test_texts_without_segments_have_no_probabilities() -> None:
    crf = LinearChainCRF(len(TAGS))
    texts = [[torch.randn(1, len(TAGS))], [torch.randn(2, len(TAGS))]]
    transitions = crf.transitions.detach().numpy()
    assert [len(each) for each in segment_probabilities(lattices(crf, texts), [[], []], transitions)] == [0, 0]
    assert [len(each) for each in segment_probabilities(lattices(crf, texts), [[], [(0, 2, 1)]], transitions)] == [0, 1]
