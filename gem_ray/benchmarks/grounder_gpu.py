"""Matcher and SAM of the paper's sizes on a GPU: speed, share of the card's peak and memory for each batch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gem_ray.benchmarks.plain import PlainMatcher
from gem_ray.benchmarks.published_sizes import ask, photos, random_blip, random_sam
from gem_ray.grounding.matcher import Matcher
from gem_ray.grounding.sam import SamSegmenter

_ENTITIES = 3  # of a post
_SECONDS = 0.6  # that a measurement lasts at least
_POINTS = [(100.0, 120.0), (320.0, 240.0), (500.0, 400.0)]

Row = dict[str, Any]


def measure_grounder_gpu(
    matcher_batches: Sequence[int] = (1, 4, 16, 64, 128, 256), sam_batches: Sequence[int] = (1, 2, 4, 8, 16, 32)
) -> dict[str, Any]:
    """Posts with an image and three entities, bfloat16, random weights.

    Args:
        matcher_batches: images in a pass of the matcher.
        sam_batches: images in a pass of SAM.

    Returns:
        `peak_tflops`, which the card reaches in multiplying large matrices, and for `match_trace`, `sam_encoder` and
        `sam_decoder` a row a batch size: images and entities a second, TFLOP a second (operations counted from shapes),
        their share of the peak, and the peak of memory. `match` and `sam` take images as they come, so that resizing
        them on the CPU counts too; `plain` is one entity at a time with a full backward pass.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs a GPU; `grounder` measures on a CPU")
    peak = matmul_peak()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9,
        "torch": torch.__version__,
        "peak_tflops": peak / 1e12,
    }
    return result | _measure_matcher(matcher_batches, peak) | _measure_sam(sam_batches, peak)


def matmul_peak(side: int = 8192) -> float:
    """Operations a second in the product of two large bfloat16 matrices."""
    left, right = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * side**3 / _seconds_of(partial(torch.mm, left, right))


def _measure_matcher(batches: Sequence[int], peak: float) -> dict[str, Any]:
    device = torch.device("cuda")
    model, texts, images = random_blip("large", torch.bfloat16, device)
    matcher = Matcher(model, texts, images, batch_size=_ENTITIES * max(batches), image_batch_size=max(batches))
    rows = []
    for batch in batches:
        squares = images.squares(photos(1)).to(device).expand(batch, -1, -1, -1)
        rows.append(_measured(batch, partial(_match_squares, matcher, squares, ask(batch, _ENTITIES)), peak))
    whole = _best(rows)["batch"]
    seconds = _seconds_of(partial(matcher.match, photos(whole), ask(whole, _ENTITIES)))
    plain = PlainMatcher(model, texts, images)
    seconds_plain = _seconds_of(partial(plain.match, photos(1), ask(1, _ENTITIES)))
    return {
        "match_trace": rows,
        "match": {"batch": whole, **_per_second(whole, seconds)},
        "match_plain": {**_per_second(1, seconds_plain)},
        "match_ratio": whole / seconds * seconds_plain,
    }


def _match_squares(matcher: Matcher, squares: torch.Tensor, queries: Sequence[Any]) -> None:
    matcher.match_states(matcher.encode_squares(squares), queries)


def _measure_sam(batches: Sequence[int], peak: float) -> dict[str, Any]:
    sam = SamSegmenter(random_sam("vit_h", torch.device("cuda")), max(batches), torch.bfloat16)
    side = sam.model.image_encoder.img_size
    encoder, decoder = [], []
    for batch in batches:
        inputs = torch.randn(1, 3, side, side, device="cuda").expand(batch, -1, -1, -1)
        encoder.append(_measured(batch, partial(_without_gradient, sam.encode, inputs), peak))
        if "images_per_second" in encoder[-1]:
            embeddings = _without_gradient(sam.encode, inputs)
            decode = partial(sam.decode_points, embeddings, [_POINTS] * batch, [(480, 640)] * batch)
            decoder.append(_measured(batch, partial(_without_gradient, decode), peak))
    whole = _best(encoder)["batch"]
    sam = SamSegmenter(sam.model, whole, torch.bfloat16)
    seconds = _seconds_of(partial(sam.masks, photos(whole), [_POINTS] * whole))
    (photo,) = photos(1)
    one_by_one = lambda: [sam.masks([photo], [[point]]) for point in _POINTS]  # noqa: E731
    seconds_plain = _seconds_of(one_by_one)
    return {
        "sam_encoder": encoder,
        "sam_decoder": decoder,
        "sam": {"batch": whole, **_per_second(whole, seconds)},
        "sam_plain": _per_second(1, seconds_plain),
        "sam_ratio": whole / seconds * seconds_plain,
    }


def _measured(batch: int, action: Callable[[], Any], peak: float) -> Row:
    """Speed, share of the peak and memory of a batch; or that it does not fit."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        with FlopCounterMode(display=False) as counter:
            action()
        torch.cuda.reset_peak_memory_stats()  # counting holds on to tensors
        seconds = _seconds_of(action)
    except torch.OutOfMemoryError:
        return {"batch": batch, "out_of_memory": True}
    speed = counter.get_total_flops() / seconds
    return {
        "batch": batch,
        **_per_second(batch, seconds),
        "tflop_per_image": counter.get_total_flops() / batch / 1e12,
        "tflops": speed / 1e12,
        "share_of_peak": speed / peak,
        "memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def _per_second(images: int, seconds: float) -> Row:
    return {"images_per_second": images / seconds, "entities_per_second": _ENTITIES * images / seconds}


def _best(rows: Sequence[Row]) -> Row:
    return max(rows, key=lambda row: row.get("images_per_second", 0.0))


def _without_gradient(function: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode():
        return function(*arguments)


def _seconds_of(action: Callable[[], Any]) -> float:
    """The mean over as many repetitions as fill `_SECONDS`, after one that does not count."""
    action()
    torch.cuda.synchronize()
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < _SECONDS or count < 3:
        action()
        torch.cuda.synchronize()
        count += 1
    return passed / count


def as_table(result: dict[str, Any]) -> str:
    """The curves as Markdown."""
    lines = [
        f"{result['device']}, {result['memory_gb']:.0f} GB; bfloat16 matrix products reach "
        f"{result['peak_tflops']:.0f} TFLOP/s.",
        "",
        "| part | images a pass | images/s | entities/s | TFLOP/s | share of the peak | GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for part in ("match_trace", "sam_encoder", "sam_decoder"):
        lines += [_line(part.replace("_", " + ", 1) if part == "match_trace" else part, row) for row in result[part]]
    for part in ("match", "sam"):
        whole, plain = result[part], result[f"{part}_plain"]
        lines += ["", f"{part}, resizing included: {whole['images_per_second']:.1f} images/s; the plain way "]
        lines[-1] += f"{plain['images_per_second']:.1f}; ratio {result[f'{part}_ratio']:.1f}."
    return "\n".join(lines) + "\n"


def _line(part: str, row: Row) -> str:
    if "out_of_memory" in row:
        return f"| {part} | {row['batch']} | out of memory | | | | |"
    return (
        f"| {part} | {row['batch']} | {row['images_per_second']:.1f} | {row['entities_per_second']:.1f} | "
        f"{row['tflops']:.0f} | {row['share_of_peak']:.0%} | {row['memory_gb']:.1f} |"
    )
