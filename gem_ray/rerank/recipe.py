"""How the reranker's adapter is trained: every number of the recipe."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from gem_ray.config import DType, ImageConfig, ImageFit, PositiveInt, Probability
from gem_ray.recipes import Recipe, load_recipe


class RerankerTraining(Recipe):
    """How an adapter is trained. The defaults are the paper's recipe; its rate is very small for LoRA."""

    rank: PositiveInt = Field(64, description="rank of the adapter")
    alpha: float = Field(128, gt=0, description="scale of the adapter, over its rank")
    dropout: Probability = Field(0.05, description="on the adapter's input")
    k: PositiveInt = Field(5, description="candidates of an entity, redrawn in each epoch")
    template: str | None = Field(None, description="conversation around `{question}`; default: the model's own")
    image_fit: ImageFit = Field("pad", description="as `reranker.image_fit`")
    max_length: PositiveInt = Field(1024, description="positions of prompt, image and answer; longer ones are left out")

    epochs: PositiveInt = Field(3, description="passes over the posts")
    batch_size: PositiveInt = Field(4, description="entities in a batch of one worker")
    learning_rate: float = Field(5e-6, gt=0, description="peak learning rate")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of AdamW")

    precision: DType = Field("float32", description="precision of the frozen base; the adapter stays in float32")
    four_bit: bool = Field(
        False, description="quantize the base to 4 bits with bitsandbytes: 7 B parameters fit a card of 24 GB"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations instead of keeping them")
    checkpoint_steps: PositiveInt = Field(500, description="steps between checkpoints")
    report_every: PositiveInt = Field(50, description="steps between reports")
    image: ImageConfig = Field(default_factory=ImageConfig, description="limits of the posts' images")


def load_reranker_recipe(name: str | None = None, **values: Any) -> RerankerTraining:
    """A recipe of the package, or the paper's, with some settings changed.

    Raises:
        ConfigError: an unknown recipe or setting, or a value that cannot be.
    """
    return load_recipe(RerankerTraining, "reranker", name, values)
