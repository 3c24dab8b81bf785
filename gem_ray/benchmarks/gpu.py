"""What benchmarks on a GPU share: the card's facts, its peak, and seconds, operations and memory of work on it.

All of it also runs on a CPU, without figures of memory, so that a script can be tried where there is no card.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

_SECONDS = 0.6  # that a measurement lasts at least

Figures = dict[str, Any]


def describe(device: torch.device) -> Figures:
    """The card and what drives it, for the head of a result."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9 if on_gpu else None,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def matmul_peak(device: torch.device, side: int = 8192) -> float:
    """Operations a second in the product of two large bfloat16 matrices of random numbers."""
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    rounds = 20  # without waiting in between, which costs a tenth here
    return rounds * 2 * side**3 / seconds_of(lambda: [left @ right for _ in range(rounds)], device)


def seconds_of(action: Callable[[], Any], device: torch.device) -> float:
    """The median of as many repetitions as fill `_SECONDS`, three at least, after two that do not count."""
    started = time.perf_counter()
    seconds: list[float] = []
    while time.perf_counter() - started < _SECONDS or len(seconds) < 5:
        begun = time.perf_counter()
        action()
        wait(device)
        seconds.append(time.perf_counter() - begun)
    return median(seconds[2:])


def measured(action: Callable[[], Any], device: torch.device, images: int, entities: int, peak: float) -> Figures:
    """Speed, share of the peak and memory of an action; or that it does not fit.

    Operations are those of matrix products and attention, counted by torch from the shapes that ran; it does not count
    attention on a CPU.

    Args:
        action: what is timed.
        device: where it runs.
        images: that it works on.
        entities: of all of them.
        peak: operations a second, from `matmul_peak`.
    """
    _forget_memory(device)
    try:
        with FlopCounterMode(display=False) as counter:
            action()
        _forget_memory(device)  # counting holds on to tensors
        seconds = seconds_of(action, device)
    except torch.OutOfMemoryError:
        return {"batch": images, "out_of_memory": True}
    speed = counter.get_total_flops() / seconds
    return {
        "batch": images,
        **per_second(images, entities, seconds),
        "tflop_per_image": counter.get_total_flops() / images / 1e12,
        "tflops": speed / 1e12,
        "share_of_peak": speed / peak,
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    }


def per_second(images: int, entities: int, seconds: float) -> Figures:
    """Images and entities a second."""
    return {"images_per_second": images / seconds, "entities_per_second": entities / seconds}


def wait(device: torch.device) -> None:
    """Until the card has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
