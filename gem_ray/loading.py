"""Loading weights strictly: a tensor that is missing, unexpected or of another shape is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from gem_ray.hub import weight_files
from gem_ray.model_kind import config_for, read_config

_NAMED = 5  # names in a message; the others are counted


@dataclass(frozen=True)
class Allowed:
    """Differences between a file and a model that do no harm: patterns of tensor names, from their beginning.

    Buffers that older versions of transformers stored (`position_ids`, `inv_freq`) and tied weights are not among them:
    `from_pretrained` leaves them out itself.

    Args:
        missing: of the model's tensors that the file may lack, because nothing reads them.
        unexpected: of the file's tensors that the model may not have.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


EXACT = Allowed()
# The body of an encoder out of a checkpoint with the head that it was pretrained with. The tagger removes the pooler,
# which many published checkpoints lack; heads are those of BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa, ModernBERT,
# ALBERT and LUKE.
ENCODER_BODY = Allowed(
    missing=(r"pooler\.",),
    unexpected=(
        r"(\w+\.)?pooler\.",
        r"(lm_head|cls|classifier|head|decoder)\.",
        r"(discriminator_predictions|generator_predictions|generator_lm_head)\.",
        r"vocab_(transform|layer_norm|projector)\.",
        r"(lm_predictions|mask_predictions|predictions|entity_predictions|sop_classifier)\.",
    ),
)


def load_pretrained(model_class: Any, folder: Path, allowed: Allowed = EXACT, **arguments: Any) -> Any:
    """`model_class.from_pretrained`, all of whose weights come from the files.

    Args:
        model_class: of transformers.
        folder: the checkpoint.
        allowed: differences that do no harm.
        arguments: passed on.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; the message names them. Or the checkpoint is
            another architecture's, or quantized.
    """
    config_for(model_class, folder)
    # Shapes that differ are then reported like the rest, by name.
    model, found = model_class.from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
    )
    _refuse(folder, allowed, **found)
    return model


def check_pretrained(model_class: Any, folder: Path, allowed: Allowed = EXACT) -> Any:
    """The same check without reading weights: names and shapes alone, for whoever loads them otherwise.

    Returns:
        The model, on the device `meta`.

    Raises:
        ValueError: as `load_pretrained`.
        FileNotFoundError: the folder holds no weights.
    """
    model, found = model_class.from_pretrained(
        None,
        config=config_for(model_class, folder),
        state_dict=weight_shapes(folder),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        device_map={"": "meta"},
    )
    _refuse(folder, allowed, **found)
    return model


def check_declared(folder: Path) -> Any:
    """Check a checkpoint against the architecture that its `config.json` names.

    What transformers does not know, and what is quantized, whose tensors have other names, is left to its reader.

    Returns:
        As `check_pretrained`; `None` for what is left to its reader.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; the message names them.
        FileNotFoundError: the folder holds no weights.
    """
    config = read_config(folder)
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if model_class is None or getattr(config, "quantization_config", None):
        return None
    return check_pretrained(model_class, folder)


def check_adapters(model: nn.Module, adapters: Mapping[str, Path]) -> None:
    """Check LoRA adapters, by name, against a model, which is of no use then.

    Raises:
        ValueError: as `load_adapters`.
    """
    for _ in _attached(model, adapters):
        pass  # attaching compares


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """`module.load_state_dict`, with the same error as `load_pretrained`.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; the message names them.
    """
    compare(module.state_dict(), weights, source)
    module.load_state_dict(weights)


def compare(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: Path) -> None:
    """Compare the names and shapes of two sets of tensors.

    Args:
        expected: the model's.
        weights: the file's.
        source: the file, for the message.

    Raises:
        ValueError: weights are missing, unexpected or of another shape; the message names them.
    """
    reshaped = [
        (name, weights[name].shape, tensor.shape)
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    _refuse(source, EXACT, expected.keys() - weights.keys(), weights.keys() - expected.keys(), reshaped)


def load_adapters(model: nn.Module, adapters: Mapping[str, Path]) -> Any:
    """The model under its LoRA adapters, by name; the first one is on.

    Raises:
        ValueError: weights of an adapter are missing, unexpected or of another shape; the message names them.
    """
    from peft import set_peft_model_state_dict  # slow to import, and few models need it

    adapted: Any = None
    for adapted, name, weights in _attached(model, adapters):
        set_peft_model_state_dict(adapted, weights, adapter_name=name)
    return adapted.eval()


def _attached(model: nn.Module, adapters: Mapping[str, Path]) -> Iterator[tuple[Any, str, dict[str, Tensor]]]:
    """The model under each further adapter, whose weights are still to be loaded and fit."""
    from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, load_peft_weights
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    adapted: Any = None
    for name, folder in adapters.items():
        if not (folder / "adapter_config.json").is_file() or not any(folder.glob("adapter_model.*")):
            raise FileNotFoundError(
                f"{folder} is no adapter: it needs adapter_config.json and adapter_model.safetensors"
            )
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type != PeftType.LORA:
            raise ValueError(f"{folder} is an adapter of the kind {config.peft_type}; name a LoRA adapter")
        config.inference_mode = True
        if adapted is None:
            adapted = PeftModel(model, config, adapter_name=name)
        else:
            adapted.add_adapter(name, config)
        # Before transformers 4.52, the parts of LLaVA and its like had other names.
        weights = convert_peft_adapter_state_dict_for_transformers(
            adapted, config, load_peft_weights(str(folder), device="cpu"), name
        )
        # Else it would ask the hub for the base's vocabulary.
        expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        compare(expected, weights, folder)
        yield adapted, name, weights


def weight_shapes(source: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, without their values: on the device `meta`.

    Args:
        source: a folder as the hub has it, or one file of weights.

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: a file cannot be read.
    """
    if source.is_file():
        try:
            return dict(_safetensors_shapes(source)) if source.suffix == ".safetensors" else _pickled_shapes(source)
        except Exception as error:  # libraries raise anything for half a file, or for a pointer of Git LFS
            raise ValueError(f"{source} cannot be read as weights ({type(error).__name__}); fetch it again") from error
    if files := weight_files(source):
        return {name: tensor for file in files for name, tensor in weight_shapes(file).items()}
    raise FileNotFoundError(f"{source} holds no weights: neither model.safetensors nor pytorch_model.bin, nor shards")


def _safetensors_shapes(file: Path) -> Iterable[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            yield name, torch.empty(opened.get_slice(name).get_shape(), device="meta")


def _pickled_shapes(file: Path) -> dict[str, Tensor]:
    try:
        return torch.load(file, map_location="meta", weights_only=True, mmap=True)
    except RuntimeError:  # the format from before torch 1.6, which cannot be mapped
        return {name: tensor.to("meta") for name, tensor in torch.load(file, weights_only=True).items()}


def _refuse(
    source: Path,
    allowed: Allowed,
    missing_keys: Iterable[str],
    unexpected_keys: Iterable[str],
    mismatched_keys: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    **_: Any,
) -> None:
    reshaped = (f"{name} {tuple(stored)} for {tuple(wanted)}" for name, stored, wanted in mismatched_keys)
    faults = {
        "missing": _others(missing_keys, allowed.missing),
        "unexpected": _others(unexpected_keys, allowed.unexpected),
        "of another shape": sorted(reshaped),
    }
    said = "; ".join(f"{kind}: {_listed(names)}" for kind, names in faults.items() if names)
    if said:
        raise ValueError(
            f"{source}: the weights are not those of the model ({said}). Fetch the checkpoint again, or see whether "
            "its config.json belongs to its weights"
        )


def _others(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if not any(re.match(pattern, name) for pattern in patterns))


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
