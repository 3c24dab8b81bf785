"""How a matcher is trained: every number of the recipe; the defaults are the paper's (§3.4.1)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from gem_ray.config import DType, ImageConfig, PositiveInt
from gem_ray.taxonomy import LabelSetName


class MatcherTraining(BaseModel):
    """Fine-tuning of BLIP's matching head and all that is under it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    labels: LabelSetName = Field("fmnerg", description="label set of the categories beside the names")
    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    epochs: PositiveInt = Field(1, description="passes over the posts")
    batch_size: PositiveInt = Field(16, description="posts, each with all its pairs, in a batch")
    gradient_accumulation: PositiveInt = Field(1, description="batches in a step of the optimizer")
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = Field("linear", description="after the warmup")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW, on matrices")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")

    image_negatives: int = Field(0, ge=0, description="mentions of other posts to add to each image, as absent")
    category_negatives: bool = Field(
        False, description="ask a name that elsewhere has another category with that one too, as absent"
    )
    balance: bool = Field(False, description="weight present and absent pairs equally")

    precision: DType = Field("float32", description="precision of the arithmetic; weights stay in float32")
    device: str = Field("auto", description="`auto`, `cpu` or `cuda`")
    checkpoint_steps: PositiveInt | None = Field(None, description="checkpoints also every so many steps")
    seed: int = Field(0, ge=0, description="random seed, for the order and the negatives")
    image: ImageConfig = Field(default_factory=ImageConfig, description="limits of images, and where they may be from")
