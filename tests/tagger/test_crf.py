"""The CRF against enumeration of all tag sequences (eq. 5 to 7), and against `torchcrf` itself."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torchcrf import CRF

from gem_ray.tagger.crf import LinearChainCRF

TAGS = 4
LENGTHS = [5, 1, 3]


@pytest.fixture
def crf() -> LinearChainCRF:
    torch.manual_seed(0)
    crf = LinearChainCRF(TAGS)
    for parameter in crf.parameters():
        torch.nn.init.normal_(parameter, std=2.0)
    return crf


@pytest.fixture
def emissions() -> Tensor:
    torch.manual_seed(1)
    return 3 * torch.randn(len(LENGTHS), max(LENGTHS), TAGS)


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def potential(crf: CRF, emissions: Tensor, tags: tuple[int, ...]) -> float:
    """The logarithm of eq. 5's numerator."""
    total = crf.start_transitions[tags[0]] + crf.end_transitions[tags[-1]]
    for position, tag in enumerate(tags):
        total = total + emissions[position, tag]
        if position:
            total = total + crf.transitions[tags[position - 1], tag]
    return total.item()


def test_likelihood_is_that_of_enumeration(crf: LinearChainCRF, emissions: Tensor, mask: Tensor) -> None:
    tags = torch.randint(TAGS, mask.shape)
    actual = crf(emissions, tags, mask, reduction="none")
    for row, length in enumerate(LENGTHS):
        everything = [potential(crf, emissions[row], path) for path in product(range(TAGS), repeat=length)]
        gold = potential(crf, emissions[row], tuple(tags[row, :length].tolist()))
        assert actual[row].item() == pytest.approx(gold - float(torch.tensor(everything).logsumexp(0)), abs=1e-4)


def test_decoding_finds_the_best_of_all_paths(crf: LinearChainCRF, emissions: Tensor, mask: Tensor) -> None:
    paths = crf.decode(emissions, mask)
    for row, length in enumerate(LENGTHS):
        candidates = product(range(TAGS), repeat=length)
        best = max(candidates, key=lambda path: potential(crf, emissions[row], path))
        assert paths[row] == list(best)


def test_it_is_torchcrf_with_the_same_parameters_and_gradients() -> None:
    torch.manual_seed(2)
    ours, reference = LinearChainCRF(103), CRF(103, batch_first=True)
    reference.load_state_dict(ours.state_dict())
    emissions = (8 * torch.randn(6, 12, 103)).requires_grad_()
    mask = torch.arange(12) < torch.tensor([12, 1, 7, 3, 12, 9])[:, None]
    tags = torch.randint(103, mask.shape)
    gradients = {}
    for crf in (ours, reference):
        likelihood = crf(emissions, tags, mask, reduction="mean")
        gradients[crf] = torch.autograd.grad(likelihood, [emissions, *crf.parameters()])
        assert crf.decode(emissions, mask) == reference.decode(emissions, mask)
    total = reference(emissions, tags, mask).item()
    assert ours(emissions, tags, mask).item() == pytest.approx(total, rel=1e-5)
    for mine, theirs in zip(gradients[ours], gradients[reference], strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ties", [False, True])
def test_decoding_a_batch_is_torchcrfs_decoding_in_ten_thousand_cases(ties: bool) -> None:
    """Whole numbers tie all the time: the same of several best paths must win."""
    generator = torch.Generator().manual_seed(3 + ties)
    for _ in range(50):
        tags, words = (int(torch.randint(1, high, (), generator=generator)) for high in (13, 12))
        ours, reference = LinearChainCRF(tags), CRF(tags, batch_first=True)
        for parameter in ours.parameters():
            nn.init.normal_(parameter, std=2.0, generator=generator)
            if ties:
                parameter.data.round_()
        reference.load_state_dict(ours.state_dict())
        emissions = 3 * torch.randn(100, words, tags, generator=generator)
        if ties:
            emissions.round_()
        mask = torch.arange(words) < torch.randint(1, words + 1, (100, 1), generator=generator)
        assert ours.decode(emissions, mask) == reference.decode(emissions, mask)


def test_large_logits_do_not_overflow(crf: LinearChainCRF) -> None:
    emissions = 1e4 * torch.randn(2, 6, TAGS)
    likelihood = crf(emissions, torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.bool))
    assert torch.isfinite(likelihood)
