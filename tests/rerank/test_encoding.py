import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from gem_ray.config import ConfigError, load_config
from gem_ray.rerank.encoding import (
    QUESTION_TOKENS,
    ChoiceTree,
    EncodedRequest,
    RequestEncoder,
    answer_ids,
    largest_image,
    positions,
)
from gem_ray.rerank.prompts import IMAGE_TOKEN, build_prompt
from gem_ray.taxonomy import FMNERG

_PROMPT = build_prompt(["so", "this", "is", "Ardenza"], 3, 4, FMNERG.fine[:5])
_SEQUENCES = [[4, 5, 2], [4, 2], [4, 5, 6, 2], [7, 2]]


def test_a_tree_holds_each_shared_prefix_once():
    tree = ChoiceTree.of(_SEQUENCES)
    assert len(tree.tokens) == 8  # 4 5 2 | 2 | 6 2 | 7 2
    for sequence, leaf in zip(_SEQUENCES, tree.leaves, strict=True):
        assert [tree.tokens[node] for node in tree.path(leaf)] == sequence


def test_a_node_sees_its_own_path_only():
    tree = ChoiceTree.of(_SEQUENCES)
    for node, seen in enumerate(tree.visibility()):
        assert np.flatnonzero(seen).tolist() == sorted(tree.path(node))


def test_scores_are_the_softmax_of_path_likelihoods_and_greedy_takes_the_best_next_token():
    tree = ChoiceTree.of(_SEQUENCES)
    logs = np.log(np.random.default_rng(1).uniform(0.01, 0.6, len(tree.tokens)))
    likelihoods = np.array([np.exp(logs[tree.path(leaf)].sum()) for leaf in tree.leaves])
    score = tree.choose(logs, "score")
    assert score.probabilities == pytest.approx((likelihoods / likelihoods.sum()).tolist())
    assert score.index == likelihoods.argmax()
    assert score.probability == max(score.probabilities)


def test_greedy_may_end_at_a_choice_that_is_less_likely_as_a_whole():
    tree = ChoiceTree.of([[4, 2], [5, 2]])
    logs = np.log([0.5, 0.1, 0.4, 0.9])  # 4, then 2; 5, then 2
    greedy = tree.choose(logs, "generate")
    assert greedy.index == 0
    assert greedy.probability == pytest.approx(0.5 / 0.9)
    assert tree.choose(logs, "score").index == 1


@pytest.mark.parametrize("choice", FMNERG.fine)
def test_an_answer_continues_the_prompt_as_a_sentencepiece_tokenizer_would_write_it(sentencepiece, choice):
    whole = sentencepiece.encode(f"{_PROMPT} {choice}</s>", add_special_tokens=False)
    prompt = sentencepiece.encode(_PROMPT, add_special_tokens=False)
    assert whole == prompt + answer_ids(sentencepiece, choice)
    # The trap: tokenized alone, with its space or without, the answer is another one, or comes to be so.
    assert sentencepiece.encode(f" {choice}", add_special_tokens=False) != whole[len(prompt) : -1]


@pytest.mark.parametrize("choice", FMNERG.fine)
def test_an_answer_continues_the_prompt_as_a_byte_level_tokenizer_would_write_it(base, choice):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.encode(f"{_PROMPT} {choice}</s>") == tokenizer.encode(_PROMPT) + answer_ids(tokenizer, choice)


def test_a_tokenizer_that_merges_the_answer_with_the_prompt_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    with pytest.raises(ValueError, match="cannot separate the answer 'park'"):
        answer_ids(whole, "park")


def test_what_is_too_long_is_an_error_that_gives_the_numbers(base, requests):
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = AutoConfig.from_pretrained(base)
    prompt = len(tokenizer.encode(requests[0].prompt)) - 1 + 16  # 4 × 4 patches in the place of one token
    longest = max(len(answer_ids(tokenizer, choice)) for choice in requests[0].choices)
    fits = RequestEncoder(tokenizer, config, prompt + longest).encode(requests[0])
    error = RequestEncoder(tokenizer, config, prompt + longest - 1).encode(requests[0])
    assert isinstance(fits, EncodedRequest)
    assert fits.prompt == tokenizer.encode(requests[0].prompt)
    assert f"takes {prompt + longest} tokens" in str(error)


def _published(tokenizer, kind):
    """The processors of LLaVA-NeXT and of Qwen2.5-VL as they are published, with another tokenizer."""
    if kind == "llava-next":
        images = LlavaNextImageProcessor(
            size={"shortest_edge": 336},
            crop_size={"height": 336, "width": 336},
            image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        )
        return LlavaNextProcessor(
            images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    images = Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    return Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())


@pytest.mark.parametrize(("kind", "low", "high"), [("llava-next", 2000, 2928), ("qwen", 1200, 1400)])
def test_the_largest_image_is_as_long_as_the_models_processor_makes_it(base, kind, low, high):
    tokenizer = LlavaProcessor.from_pretrained(base).tokenizer
    names = {"image_token": IMAGE_TOKEN, "video_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", extra_special_tokens=names
    )
    processor = _published(tokenizer, kind)
    token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    longest = largest_image(processor, token, 1024)
    assert low <= longest <= high
    rng = np.random.default_rng(0)
    for _ in range(4):
        width = int(rng.integers(256, 1024))
        image = Image.new("RGB", (width, 1024))
        ids = processor(text=[IMAGE_TOKEN], images=[image], return_tensors="np")["input_ids"]
        assert (ids == token).sum() <= longest * 1.02
    settings = load_config().reranker
    assert positions(settings, longest, 1024) == longest + 448
    with pytest.raises(ConfigError, match=f"is 1024, but .* makes up to {longest} tokens of an image of 1024 pixels"):
        positions(settings.model_copy(update={"max_model_len": 1024}), longest, 1024)
    least = longest + QUESTION_TOKENS  # as the message says
    assert positions(settings.model_copy(update={"max_model_len": least}), longest, 1024) == least


def test_models_of_few_image_tokens_read_as_much_as_before():
    settings = load_config().reranker
    assert [positions(settings, tokens, 1024) for tokens in (0, 100, 576)] == [1024, 1024, 1024]
