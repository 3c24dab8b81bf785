"""Matcher and SAM of the paper's sizes on a GPU: speed, share of the card's peak and memory for each batch size.

Needs torch, transformers, segment-anything and pydantic, and no download.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from gem_ray.benchmarks.gpu import Figures, describe, matmul_peak, measured, per_second, seconds_of
from gem_ray.benchmarks.plain import PlainMatcher
from gem_ray.benchmarks.published_sizes import PublishedBlip, PublishedSam, ask, photos, random_blip, random_sam
from gem_ray.device import torch_device
from gem_ray.grounding.matcher import Matcher, MatchQuery
from gem_ray.grounding.sam import SamSegmenter

_ENTITIES = 3  # of a post
_POINTS = [(100.0, 120.0), (320.0, 240.0), (500.0, 400.0)]

# A part of the result -> what the table calls it.
_PARTS = {
    "match_trace": "match + trace",
    "match_trace_plain": "the plain way",
    "sam_encoder": "SAM's image encoder",
    "sam_encoder_package": "with its package's attention",
    "sam_decoder": "SAM's decoder",
}


def measure_grounder_gpu(
    matcher_batches: Sequence[int] = (1, 4, 16, 32, 64, 128, 256),
    sam_batches: Sequence[int] = (1, 2, 4, 8, 16, 32),
    blip: PublishedBlip = "large",
    sam: PublishedSam = "vit_h",
) -> dict[str, Any]:
    """Posts with an image and three entities, bfloat16, random weights.

    Args:
        matcher_batches: images in a pass of the matcher.
        sam_batches: images in a pass of SAM.
        blip: size of the matcher.
        sam: size of SAM.

    Returns:
        The card; `peak_tflops`, which it reaches in multiplying large matrices; and for each part a row a batch size:
        images and entities a second, TFLOP a second (operations counted from shapes), their share of the peak, and the
        peak of memory. `match_trace_plain` has a row for each entity of the batch instead of one for each image, no
        fused attention and a full backward pass; `sam_encoder_package` the attention of SAM's package; `ratio` in the
        rows of `match_trace` and `sam_encoder` is their speed over that of the same batch there. `match` and `sam` take
        images as they come, so that resizing them on the CPU counts too, against one entity at a time.
    """
    device = torch_device("auto")
    torch.manual_seed(0)
    peak = matmul_peak(device, 8192 if device.type == "cuda" else 256)
    result = {**describe(device), "blip": blip, "sam": sam, "peak_tflops": peak / 1e12}
    return {
        **result,
        **_measure_matcher(blip, matcher_batches, device, peak),
        **_measure_sam(sam, sam_batches, device, peak),
    }


def _measure_matcher(size: PublishedBlip, batches: Sequence[int], device: torch.device, peak: float) -> Figures:
    parts = random_blip(size, torch.bfloat16, device)
    matcher = Matcher(*parts, batch_size=_ENTITIES * max(batches), image_batch_size=max(batches))
    plain = PlainMatcher(*parts)
    (square,) = matcher.images.squares(photos(1)).to(device)

    def shared(batch: int) -> Callable[[], Any]:
        return partial(_match_squares, matcher, square.expand(batch, -1, -1, -1), ask(batch, _ENTITIES))

    def unshared(batch: int) -> Callable[[], Any]:
        squares = square.expand(batch * _ENTITIES, -1, -1, -1)
        return partial(plain.match_squares, squares, ask(batch, _ENTITIES))

    rows = _curve(shared, batches, device, peak)
    rows_plain = _curve(unshared, batches, device, peak)
    whole = _best(rows)["batch"]
    seconds = seconds_of(partial(matcher.match, photos(whole), ask(whole, _ENTITIES)), device)
    seconds_plain = seconds_of(partial(plain.match, photos(1), ask(1, _ENTITIES)), device)
    return {
        "match_trace": _against(rows, rows_plain),
        "match_trace_plain": rows_plain,
        **_whole("match", whole, seconds, seconds_plain),
    }


def _match_squares(matcher: Matcher, squares: torch.Tensor, queries: Sequence[MatchQuery]) -> None:
    matcher.match_states(matcher.encode_squares(squares), queries)


def _measure_sam(size: PublishedSam, batches: Sequence[int], device: torch.device, peak: float) -> Figures:
    model = random_sam(size, device)
    side, prompts = model.image_encoder.img_size, model.prompt_encoder
    image = torch.randn(1, 3, side, side, device=device)
    embedding = torch.randn(1, prompts.embed_dim, *prompts.image_embedding_size, device=device)

    def decode(batch: int) -> Callable[[], Any]:
        embeddings = embedding.expand(batch, -1, -1, -1)
        return partial(_without_gradient, sam.decode_points, embeddings, [_POINTS] * batch, [(480, 640)] * batch)

    def encode(batch: int) -> Callable[[], Any]:
        return partial(_without_gradient, sam.encode, image.expand(batch, -1, -1, -1))

    def encode_as_package(batch: int) -> Callable[[], Any]:
        return partial(_without_gradient, model.image_encoder, image.to(torch.bfloat16).expand(batch, -1, -1, -1))

    model.image_encoder.to(torch.bfloat16)
    package = _curve(encode_as_package, batches, device, peak)
    sam = SamSegmenter(model, max(batches), torch.bfloat16)  # fuses the attention
    fused = _curve(encode, batches, device, peak)
    whole = _best(fused)["batch"]
    segmenter = SamSegmenter(model, whole, torch.bfloat16)
    seconds = seconds_of(partial(segmenter.masks, photos(whole), [_POINTS] * whole), device)
    (photo,) = photos(1)
    seconds_plain = seconds_of(lambda: [segmenter.masks([photo], [[point]]) for point in _POINTS], device)
    return {
        "sam_encoder": _against(fused, package),
        "sam_encoder_package": package,
        "sam_decoder": _curve(decode, batches, device, peak),
        **_whole("sam", whole, seconds, seconds_plain),
    }


def _curve(
    action_of: Callable[[int], Callable[[], Any]], batches: Sequence[int], device: torch.device, peak: float
) -> list[Figures]:
    """A row for each batch size, up to the first that does not fit."""
    rows: list[Figures] = []
    for batch in batches:
        rows.append(measured(action_of(batch), device, batch, _ENTITIES * batch, peak))
        if "out_of_memory" in rows[-1]:
            break
    return rows


def _against(rows: Sequence[Figures], others: Sequence[Figures]) -> list[Figures]:
    """The rows, each with its speed over that of the same batch in the others."""
    speeds = {row["batch"]: row.get("images_per_second") for row in others}

    def ratio(row: Figures) -> float | None:
        other = speeds.get(row["batch"])
        return row["images_per_second"] / other if other and "images_per_second" in row else None

    return [{**row, "ratio": ratio(row)} for row in rows]


def _whole(part: str, images: int, seconds: float, seconds_plain: float) -> Figures:
    """From images as they come; the plain time is that of one image."""
    return {
        f"{part}_whole": {"batch": images, **per_second(images, _ENTITIES * images, seconds)},
        f"{part}_whole_plain": per_second(1, _ENTITIES, seconds_plain),
        f"{part}_whole_ratio": images / seconds * seconds_plain,
    }


def _best(rows: Sequence[Figures]) -> Figures:
    return max(rows, key=lambda row: row.get("images_per_second", 0.0))


def _without_gradient(function: Callable[..., Any], *arguments: Any) -> Any:
    with torch.inference_mode():
        return function(*arguments)


def as_table(result: dict[str, Any]) -> str:
    """The curves as Markdown."""
    return "\n".join(_lines(result)) + "\n"


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['device']}, torch {result['torch']}; bfloat16 matrix products reach "
    yield f"{result['peak_tflops']:.0f} TFLOP/s."
    yield ""
    yield "| part | images a pass | images/s | entities/s | ratio | TFLOP/s | share of the peak | GB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for part, name in _PARTS.items():
        for row in result[part]:
            yield f"| {name} | {row['batch']} | {' | '.join(_cells(row))} |"
    for part in ("match", "sam"):
        whole, plain = result[f"{part}_whole"], result[f"{part}_whole_plain"]
        yield ""
        yield f"{part}, resizing included: {whole['images_per_second']:.1f} images/s; one entity at a time "
        yield f"{plain['images_per_second']:.1f}; ratio {result[f'{part}_whole_ratio']:.1f}."


def _cells(row: Figures) -> list[str]:
    if "out_of_memory" in row:
        return ["out of memory", "", "", "", "", ""]
    ratio, memory = row.get("ratio"), row["memory_gb"]
    return [
        f"{row['images_per_second']:.1f}",
        f"{row['entities_per_second']:.1f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{row['tflops']:.0f}",
        f"{row['share_of_peak']:.1%}",
        "" if memory is None else f"{memory:.1f}",
    ]
