"""Entity–image matching (§3.4.1) with a BLIP image–text matching head, and the map that explains each match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BlipForImageTextRetrieval, BlipImageProcessorPil, PreTrainedTokenizerBase

from gem_ray.config import Config, MatcherConfig
from gem_ray.device import torch_device
from gem_ray.grounding.batches import Batches
from gem_ray.grounding.blip import encode_images, load_blip
from gem_ray.grounding.decision import Decision
from gem_ray.grounding.trace import Target, match_and_trace, middle_upper_layer
from gem_ray.model_kind import require_words
from gem_ray.model_paths import resolve

ENC_TOKEN = "[ENC]"
MAX_TOKENS = 64  # an entity is a few words

TokenSet = Literal["all", "inner", "words"]


@dataclass(frozen=True)
class MatchQuery:
    """Is this entity in that image? `image` is a position in the list of images."""

    image: int
    entity: str
    category: str

    @property
    def text(self) -> str:
        """Table 8's template, (sic)."""
        return f"{self.entity} is belong {self.category}."


@dataclass(frozen=True)
class Match:
    """The answer to a query: `probability` is P_T, `map` the scores of eq. 11, `(gh, gw)` float32."""

    probability: float
    map: np.ndarray


@dataclass(frozen=True)
class TextBatch:
    """Tokenised queries: four `(B, T)` tensors.

    `inner` marks the tokens that are neither special nor padding, `words` those of the entity's own words.
    """

    input_ids: Tensor
    attention_mask: Tensor
    inner: Tensor
    words: Tensor

    def counted(self, tokens: TokenSet) -> Tensor:
        """The tokens that eq. 11 sums over."""
        return {"all": self.attention_mask.bool(), "inner": self.inner, "words": self.words}[tokens]


class TextProcessor:
    """Turns queries into token ids that begin with `[ENC]`, as BLIP's matching head was trained.

    Args:
        tokenizer: a BERT tokenizer; `[ENC]` is added, as BLIP's authors do, if the published files lack it.
        vocab_size: rows of the text encoder's embedding.

    Raises:
        ValueError: the text encoder has no embedding for `[ENC]`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        if ENC_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": [ENC_TOKEN]})
        self.tokenizer = tokenizer
        self.enc_id = tokenizer.convert_tokens_to_ids(ENC_TOKEN)
        if self.enc_id >= vocab_size:
            raise ValueError(f"the model has {vocab_size} token embeddings, none for {ENC_TOKEN} (id {self.enc_id})")

    def __call__(self, queries: Sequence[MatchQuery], device: torch.device) -> TextBatch:
        """Tokenise and pad `B` queries."""
        encoded = self.tokenizer(
            [query.text for query in queries],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_special_tokens_mask=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        input_ids = encoded["input_ids"]
        input_ids[:, 0] = self.enc_id  # in place of [CLS]
        inner = encoded["special_tokens_mask"] == 0
        lengths = torch.tensor([len(query.entity) for query in queries])
        words = inner & (encoded["offset_mapping"][..., 0] < lengths[:, None])  # the text begins with the entity
        words |= inner & ~words.any(dim=1, keepdim=True)  # an entity of characters that yield no token
        return TextBatch(input_ids.to(device), encoded["attention_mask"].to(device), inner.to(device), words.to(device))


def resize_square(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image `(h, w, 3)` uint8 to `(side, side, 3)`, whatever its shape."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


class ImageProcessor:
    """Turns `(h, w, 3)` uint8 images of any size into BLIP's square input: bicubic resize, then normalisation.

    Args:
        side: of the square, in pixels.
        mean: of each channel, of values from 0 to 1.
        std: of each channel.
    """

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.side = side
        self.mean = torch.tensor(mean)[:, None, None] * 255
        self.std = torch.tensor(std)[:, None, None] * 255

    @classmethod
    def from_pretrained(cls, folder: Path) -> ImageProcessor:
        """Read `preprocessor_config.json` (or the image part of `processor_config.json`).

        Raises:
            ValueError: the model's input is not square.
        """
        published = BlipImageProcessorPil.from_pretrained(folder)
        height, width = published.size["height"], published.size["width"]
        if height != width:
            raise ValueError(f"{folder}: image size {height} × {width} is not square")
        return cls(height, published.image_mean, published.image_std)

    def normalize(self, squares: Tensor) -> Tensor:
        """`(N, side, side, 3)` uint8 to `(N, 3, side, side)` float32, on the device where they are."""
        mean, std = self.mean.to(squares.device), self.std.to(squares.device)
        return (squares.permute(0, 3, 1, 2).float() - mean) / std

    def squares(self, images: Sequence[np.ndarray]) -> Tensor:
        """`N` images to `(N, side, side, 3)` uint8."""
        return torch.from_numpy(np.stack([resize_square(image, self.side) for image in images]))

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """`N` images to `(N, 3, side, side)` float32."""
        return self.normalize(self.squares(images))


def load_processors(folder: Path, model: BlipForImageTextRetrieval) -> tuple[TextProcessor, ImageProcessor]:
    """What turns queries and images into the input of a model, from its folder.

    Raises:
        OSError: files are missing.
        ValueError: the tokenizer or the image's size cannot be the model's.
    """
    rows = model.config.text_config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(folder)
    require_words(tokenizer, rows, folder)
    return TextProcessor(tokenizer, rows), ImageProcessor.from_pretrained(folder)


class Matcher:
    """Says how probably each entity is seen in its image, and where.

    An image is encoded once, however many entities are asked of it; entities of all images share batches.

    Args:
        model: frozen and put in evaluation mode here.
        texts: its text processor.
        images: its image processor.
        layer: cross-attention layer to trace; default: the middle-upper one.
        tokens: text tokens that eq. 11 sums over; `inner` leaves the special ones out, `words` also the category.
        target: what eq. 11 differentiates.
        batch_size: queries in one pass through the text encoder, at most.
        image_batch_size: images in one pass through the image encoder, at most.

    Raises:
        ValueError: the text encoder has no such layer.
    """

    def __init__(
        self,
        model: BlipForImageTextRetrieval,
        texts: TextProcessor,
        images: ImageProcessor,
        layer: int | None = None,
        tokens: TokenSet = "all",
        target: Target = "probability",
        batch_size: int = 32,
        image_batch_size: int = 16,
    ) -> None:
        depth = model.config.text_config.num_hidden_layers
        if layer is not None and layer >= depth:
            raise ValueError(f"grounder.matcher.layer is {layer}; the text encoder has layers 0 to {depth - 1}")
        self.model = model.eval().requires_grad_(False)
        self.texts = texts
        self.images = images
        self.layer = middle_upper_layer(depth) if layer is None else layer
        self.tokens: TokenSet = tokens
        self.target: Target = target
        self._query_batches = Batches.on(model.device, batch_size)
        self._image_batches = Batches.on(model.device, image_batch_size)

    @classmethod
    def from_config(cls, config: Config) -> Matcher:
        """Load the model that `grounder.matcher` names; it raises what `load_blip` does."""
        settings = config.grounder.matcher
        folder = resolve(settings.model)
        return cls.of(
            load_blip(folder, getattr(torch, settings.dtype)).to(torch_device(config.device)), folder, settings
        )

    @classmethod
    def of(cls, model: BlipForImageTextRetrieval, folder: Path, settings: MatcherConfig) -> Matcher:
        """Around a model, perhaps on the device `meta`, with what is in its folder beside the weights.

        Raises:
            OSError: files are missing.
            ValueError: a file cannot be the model's, or the text encoder has no such layer.
        """
        return cls(
            model,
            *load_processors(folder, model),
            Decision.load(folder).layer if settings.layer is None else settings.layer,
            settings.tokens,
            settings.target,
            settings.batch_size,
            settings.image_batch_size,
        )

    def match(self, images: Sequence[np.ndarray], queries: Sequence[MatchQuery]) -> list[Match]:
        """Answer queries about `(h, w, 3)` uint8 images, in the order of the queries."""
        if not queries:
            return []
        states = self.encode_images(images)
        return self._query_batches.run(lambda batch: self.match_states(states, batch), queries)

    def encode_images(self, images: Sequence[np.ndarray]) -> Tensor:
        """The image encoder's output, `(N, 1 + P, D)`, class patch first."""
        return torch.stack(
            self._image_batches.run(lambda batch: list(self.encode_squares(self.images.squares(batch))), images)
        )

    @torch.no_grad()
    def encode_squares(self, squares: Tensor) -> Tensor:
        """The same for one batch of images that are resized already, `(N, side, side, 3)` uint8."""
        pixels = self.images.normalize(squares.to(self.model.device))
        return encode_images(self.model, pixels.to(self.model.dtype))

    def match_states(self, states: Tensor, queries: Sequence[MatchQuery]) -> list[Match]:
        """Answer one batch of queries about encoded images."""
        rows, image_of_query = torch.unique(torch.tensor([query.image for query in queries]), return_inverse=True)
        batch = self.texts(queries, states.device)
        probabilities, scores = match_and_trace(
            self.model,
            batch.input_ids,
            batch.attention_mask,
            batch.counted(self.tokens),
            states[rows.to(states.device)],
            image_of_query.to(states.device),
            self.layer,
            self.target,
        )
        side = self.images.side // self.model.config.vision_config.patch_size
        maps = scores.view(-1, side, side).cpu().numpy()
        return [Match(float(p), m) for p, m in zip(probabilities.tolist(), maps, strict=True)]
