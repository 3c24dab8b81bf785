"""Tags without a CRF: likelihood and repair against plain computations."""

import itertools

import torch

from gem_ray.tagger.softmax import IndependentTags, repair_bio
from gem_ray.taxonomy import GMNER, decode_bio


def test_likelihood_is_the_sum_of_the_words_log_probabilities() -> None:
    torch.manual_seed(0)
    emissions, tags = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    lengths = [4, 2, 1]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    expected = [
        sum(float(emissions[row, word].softmax(0)[tags[row, word]].log()) for word in range(length))
        for row, length in enumerate(lengths)
    ]
    torch.testing.assert_close(
        IndependentTags()(emissions, tags, mask, reduction="none"), torch.tensor(expected), atol=1e-5, rtol=0
    )
    assert abs(float(IndependentTags()(emissions, tags, mask)) - sum(expected) / 3) < 1e-5


def test_repair_gives_the_valid_sequence_with_the_same_spans() -> None:
    """Every sequence of four tags over two categories, against the evaluation's own reading."""
    names = GMNER.fine_tags[:5]
    sequences = list(itertools.product(range(5), repeat=4))
    for before, after in zip(sequences, repair_bio(torch.tensor(sequences)).tolist(), strict=True):
        raw, repaired = [names[tag] for tag in before], [names[tag] for tag in after]
        assert decode_bio(repaired) == decode_bio(raw)
        for previous, tag in zip(["O", *repaired], repaired, strict=False):
            assert not tag.startswith("I-") or previous in (tag, tag.replace("I-", "B-"))


def test_decoding_takes_the_best_tag_of_the_words_that_there_are() -> None:
    emissions = torch.eye(5)[torch.tensor([[2, 2, 0, 4], [1, 2, 0, 0]])]
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert IndependentTags().decode(emissions, mask) == [[1, 2, 0, 3], [1, 2]]
