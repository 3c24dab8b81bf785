from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BlipForImageTextRetrieval

from gem_ray.nano.blip import BlipSize, build_blip

BuildBlip = Callable[..., Path]


@pytest.fixture(scope="session")
def build_random_blip(tmp_path_factory: pytest.TempPathFactory) -> BuildBlip:
    """Writes a small random BLIP whose weights are large enough for its attention to be far from uniform."""

    def build(layers: int = 4, side: int = 32) -> Path:
        out = tmp_path_factory.mktemp("blip")
        torch.manual_seed(layers)
        size = BlipSize(image_side=side, patch=8, width=24, heads=3, image_layers=1, text_layers=layers)
        build_blip(out, ["Cleveland is belong sports_team.", "The Edge of the Sea is belong written_work."], size)
        model = BlipForImageTextRetrieval.from_pretrained(out)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "LayerNorm" not in name and "norm" not in name:
                    parameter.mul_(8)
        model.save_pretrained(out)
        return out

    return build


@pytest.fixture(scope="session")
def random_blip(build_random_blip: BuildBlip) -> Path:
    return build_random_blip()
