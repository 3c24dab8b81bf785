"""Peak memory of decoding the largest images that the limits admit, one at a time and many at once."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from gem_ray.config import Config, ImageConfig, load_config
from gem_ray.data.images import BYTES_PER_PIXEL, ImageLoader
from gem_ray.records import Entity, Post

AT_ONCE = 32

# The modes and options of each format that take most memory for a pixel.
_WORST: dict[str, tuple[str, dict[str, Any]]] = {
    "WEBP": ("RGBA", {"lossless": True, "method": 0}),
    "PNG": ("RGBA", {"compress_level": 1}),
    "TIFF": ("RGBA", {"compression": "tiff_adobe_deflate"}),
    "AVIF": ("RGBA", {"speed": 10, "quality": 30}),
    "BMP": ("RGB", {}),
    "GIF": ("P", {"transparency": 0}),
    "JPEG": ("CMYK", {"progressive": True, "quality": 50}),
}


def measure_decoding(folder: Path) -> dict[str, Any]:
    """Peak resident memory in MiB, above that of a process that has decoded a small image.

    Each figure is of a process of its own, because a process' peak does not go down. An image has the most pixels that
    the default limits admit for its format, or in a request to the service; `bomb` is a WebP of 38 bytes that claims
    16,383 × 16,383 pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config()
    limits = {"bulk": config.image, "online": config.online_image}
    result: dict[str, Any] = {}
    for name, image in limits.items():
        files = dict(_largest(folder / name, image)) | {"bomb": _bomb(folder)}
        result[name] = {
            kind: {"bytes": file.stat().st_size, "side": side}
            | {f"{count}_at_once_mib": _peak(file, name, count) for count in (1, AT_ONCE)}
            for kind, (file, side) in ((kind, (file, _side(file))) for kind, file in files.items())
        }
    return result


def _largest(folder: Path, limits: ImageConfig) -> Iterator[tuple[str, Path]]:
    folder.mkdir(exist_ok=True)
    for kind, (mode, options) in _WORST.items():
        side = math.isqrt(min(limits.max_pixels, limits.max_decoding_bytes // BYTES_PER_PIXEL[kind]))
        file = folder / f"largest.{kind.lower()}"
        Image.new(mode, (side, side), 1 if mode == "P" else (200, 60, 20, 90)[: len(mode)]).save(file, kind, **options)
        if file.stat().st_size <= limits.max_bytes:  # else the encoded size is what refuses it
            yield kind, file


def _bomb(folder: Path) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "WEBP", lossless=True)
    data = bytearray(buffer.getvalue())
    place = data.index(b"VP8L") + 9  # 14 bits of width - 1, then of height - 1
    bits = int.from_bytes(data[place : place + 4], "little") & ~(2**28 - 1)
    data[place : place + 4] = (bits | 16382 | 16382 << 14).to_bytes(4, "little")
    file = folder / "bomb.webp"
    file.write_bytes(data)
    return file


def _side(file: Path) -> int:
    with Image.open(file) as image:
        return image.width


def _peak(file: Path, limits: str, count: int) -> int:
    command = [sys.executable, "-m", "gem_ray.benchmarks.decoding", str(file), limits, str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return round(float(done.stdout))


def _decode(file: Path, limits: str, count: int) -> float:
    config: Config = load_config()
    loader = ImageLoader(config.image if limits == "bulk" else config.online_image)
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    loader([_post(small.getvalue())])
    before = _peak_kib()
    loader([_post(file.read_bytes()) for _ in range(count)])
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Of this process alone: what `getrusage` says includes its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def _post(image: bytes) -> Post:
    return Post("1", "Lyon", ["Lyon"], image_bytes=image, entities=[Entity("Lyon", 0, 4, 0, 1, "LOC", "city", 1.0)])


if __name__ == "__main__":
    print(json.dumps(_decode(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
