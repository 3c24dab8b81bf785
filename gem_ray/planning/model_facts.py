"""How large a model is and what shape it has: from its own files where they are, else from the published table."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_ray.config import ConfigError, merge_trees
from gem_ray.hub import loaded_files
from gem_ray.model_paths import local, resolve
from gem_ray.planning.published import PUBLISHED, find_published

_BYTES_OF_A_PTH_WEIGHT = 4  # SAM's are in float32


class UnknownModelError(ConfigError):
    """A model of which a plan cannot say what it needs; the message says what is missing."""


class Shape(dict[str, Any]):
    """A model's `config.json`, complete.

    Args:
        key: of the configuration, for the message.
        values: of the file.

    Raises:
        UnknownModelError: when it is asked for what models of another architecture have.
    """

    def __init__(self, key: str, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._key = key

    def __missing__(self, name: str) -> Any:
        raise UnknownModelError(f"{self._key}: the model has no {name} in its config.json: it is of another kind")


@dataclass(frozen=True)
class ModelFacts:
    """What a plan needs of a model.

    Attributes:
        name: short, for a table.
        parameters: weights in its files.
        shape: its `config.json`.
        source: where both are from.
    """

    name: str
    parameters: int
    shape: Shape
    source: str


def model_facts(key: str, reference: str, like: str, built_like: dict[str, str]) -> ModelFacts:
    """The facts of the model that a configuration names.

    Args:
        key: of the configuration, for the message.
        reference: what the key says.
        like: a published model; what a `config.json` leaves out is as in this one.
        built_like: what models that are not there are built like.

    Raises:
        UnknownModelError: the model is neither there nor known.
    """
    name = reference.rstrip("/").rpartition("/")[2]
    path = local(reference)
    if path is not None:
        shape = read_shape(path)
        if "num_attention_heads" in shape:  # keys and values are grouped only where it is said
            shape = {"num_key_value_heads": shape["num_attention_heads"], **shape}
        return ModelFacts(
            name, count_parameters(path), Shape(key, merge_trees(PUBLISHED[like].shape, shape)), "its files"
        )
    published = find_published(reference)
    if published is not None:
        return ModelFacts(name, published.parameters, Shape(key, published.shape), published.source)
    stand_in = built_like.get(reference)
    published = find_published(stand_in) if stand_in else None
    if published is not None:
        return ModelFacts(name, published.parameters, Shape(key, published.shape), f"not there yet; as {stand_in}")
    raise UnknownModelError(
        f"{key}: there is no model at {reference!r}, and it is none of the published models whose size is known; "
        f"get it, or say what it will be built like: "
        f"--set 'pipeline.built_like={{{reference}: {like}}}'"
    )


def is_known(reference: str, built_like: dict[str, str]) -> bool:
    """Whether `model_facts` can say something about a model."""
    return local(reference) is not None or any(map(find_published, (reference, built_like.get(reference, ""))))


def count_parameters(path: Path) -> int:
    """Weights in a checkpoint's files, counted from their headers; a tagger's base encoder is counted in."""
    if path.is_file():
        return path.stat().st_size // _BYTES_OF_A_PTH_WEIGHT
    if checkpoint := next(path.glob("sam_vit_*.pth"), None):
        return count_parameters(checkpoint)
    own = sum(_sizes(path).values())
    shape = _read_json(path / "config.json")
    if base := shape.get("base_encoder"):
        sizes = _sizes(resolve(base))
        own += sum(sizes[name.removeprefix("encoder.")] for name in shape["from_base"])
    return own


def read_shape(path: Path) -> dict[str, Any]:
    """A checkpoint's `config.json`; of a tagger, its encoder's; of a published SAM, the one that is as large."""
    if path.is_file() or next(path.glob("sam_vit_*.pth"), None):
        size = count_parameters(path)
        sams = [published for name, published in PUBLISHED.items() if name.startswith("sam_vit_")]
        return min(sams, key=lambda each: abs(each.parameters - size)).shape
    shape = _read_json(path / "config.json")
    if base := shape.get("base_encoder"):
        return read_shape(resolve(base))
    if shape.get("model_type") == "sam" and "vision_config" in shape:
        return _sam_of_the_hub(shape["vision_config"])
    return shape.get("encoder") or shape


def _sam_of_the_hub(vision: dict[str, Any]) -> dict[str, Any]:
    """The shape of a SAM as `published` has it, from transformers' `config.json`; vit_b's where it says nothing."""
    keys = {
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "window": "window_size",
        "global_layers": "global_attn_indexes",
        "image_size": "image_size",
        "patch_size": "patch_size",
    }
    usual = PUBLISHED["sam_vit_b_01ec64.pth"].shape
    return {own: vision.get(key, usual[own]) for own, key in keys.items()}


def _sizes(folder: Path) -> dict[str, int]:
    """The number of values in each tensor of the weight files that are loaded."""
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    try:
        loaded = loaded_files(names, lambda name: (folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"the size of {folder} is not known: {error}") from None
    files = [folder / name for name in sorted(loaded) if "/" not in name]
    sizes: dict[str, int] = {}
    for file in files:
        if file.suffix == ".safetensors":
            sizes |= _header(file)
        elif file.suffix == ".bin":
            sizes |= _pickled(file)
    return sizes


def _pickled(file: Path) -> dict[str, int]:
    """Of weights saved by `torch.save`; nothing but shapes is read where the file's format allows it."""
    import torch

    try:
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except RuntimeError:  # the format from before torch 1.6, which cannot be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    return {name: tensor.numel() for name, tensor in tensors.items()}


def _header(file: Path) -> dict[str, int]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__"}


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
