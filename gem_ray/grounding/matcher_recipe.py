"""How a matcher is trained: every number of the recipe; the defaults are the paper's (§3.4.1)."""

from __future__ import annotations

from pydantic import Field

from gem_ray.config import ImageConfig, PositiveInt
from gem_ray.recipes import Recipe


class MatcherTraining(Recipe):
    """Fine-tuning of BLIP's matching head and all that is under it."""

    learning_rate: float = Field(5e-5, gt=0, description="peak learning rate")
    epochs: PositiveInt = Field(1, description="passes over the posts")
    batch_size: PositiveInt = Field(16, description="posts, each with all its pairs, in a batch")
    weight_decay: float = Field(0.05, ge=0, description="weight decay of AdamW, on matrices")

    image_negatives: int = Field(0, ge=0, description="mentions of other posts to add to each image, as absent")
    category_negatives: bool = Field(
        False, description="ask a name that elsewhere has another category with that one too, as absent"
    )
    balance: bool = Field(False, description="weight present and absent pairs equally")

    checkpoint_steps: PositiveInt | None = Field(None, description="checkpoints also every so many steps")
    image: ImageConfig = Field(default_factory=ImageConfig, description="limits of images, and where they may be from")
