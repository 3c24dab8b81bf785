"""How the text-prompted segmenter is trained: every number of the recipe."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt

from gem_ray.config import PositiveInt
from gem_ray.grounding.one_cycle import OneCycle


class TextSegmenterTraining(OneCycle):
    """Training of CLIPSeg: its decoder, or all of it."""

    steps: PositiveInt = Field(2000, description="steps of the optimizer")
    batch_size: PositiveInt = Field(16, description="images in a step")
    absent: NonNegativeInt = Field(
        2, description="prompts for absent objects to add to each image; their mask is empty"
    )
    train_backbone: bool = Field(False, description="train CLIP too; otherwise only the decoder")
    seed: int = Field(0, description="random seed, for the order of samples and the absent prompts")
    device: str = Field("auto", description="as the config's `device`")
