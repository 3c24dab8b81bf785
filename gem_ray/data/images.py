"""Encoded images of any origin to upright RGB pixels, or a sentence that says why not."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from threading import Condition

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, TILELENGTH, TILEWIDTH, TiffImageFile

from gem_ray.config import Config, ImageConfig
from gem_ray.data import exif
from gem_ray.data.fetch import Fetcher, ImageError
from gem_ray.data.formats import LFS_POINTER
from gem_ray.data.jpeg import count_scans, has_all_scans, is_cut_off, with_end
from gem_ray.records import Post, ProblemKind

__all__ = ["DecodedImage", "ImageError", "ImageLoader", "decode_image", "image_suffix"]

# Pillow knows some fifty formats, among them some that run other programs; posts bring these.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF")
_JPEGS = ("JPEG", "MPO")

# EXIF orientation -> what makes the image upright; 1 and unknown values leave it as it is.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)

# What comes in place of images, by how it begins (lower case, white space stripped).
_MARKUP = (
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<head", "an HTML page"),
    (b"<body", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<!doctype svg", "an SVG drawing"),
    (b"<?xml", "an XML document"),
    (b"<", "a markup document"),
    (b"{", "a JSON document"),
    (b"%pdf", "a PDF document"),
    (b"%!ps", "a PostScript document"),
    (LFS_POINTER, "a Git LFS pointer"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x1ae\xdf\xa3", "a WebM or Matroska video"),
)
# And what begins like an image but holds none that can be opened.
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"RIFF", "WebP"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_UNSUPPORTED = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x18ftypcrx ", "Canon raw"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"heim", b"heis")
_AVIF_BRANDS = (b"avif", b"avis")

_MAGIC_BYTES = 16

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNK_FRAME = 12  # bytes of a chunk beside its content: length, name, checksum
_MAX_PNG_TEXT = 2**16

# A progressive JPEG of 300 kB can have 20,000 scans, each of which goes over all pixels: a minute for 4 million.
# Encoders make about ten.
_MAX_SCANS = 100

# What decoding takes at its peak, in bytes for a pixel of the original: measured on the worst modes of each format
# (`python jobs/benchmark.py decoding`), rounded up.
BYTES_PER_PIXEL = {"JPEG": 8, "MPO": 8, "GIF": 11, "BMP": 10, "TIFF": 14, "PNG": 14, "AVIF": 17, "WEBP": 22}

# Pillow decodes outside the interpreter's lock. Each decoding may hold a full-size image for a moment.
_DECODED_AT_ONCE = min(8, os.cpu_count() or 1)

# Pillow takes memory in blocks of 16 MiB, which stay with the thread that has decoded: glibc gives back at once what is
# above 32 MiB. Without this, 32 images that take 1 GiB each, one after the other, left a process with 10 GiB.
Image.core.set_block_size(64 * 2**20)

# Pillow's warnings of metadata that the picture does not need; those of large images are of another category.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class DecodedImage:
    """An image ready for the models.

    `pixels` is `(h, w, 3)` uint8 RGB, upright, perhaps reduced; `width` × `height` is the upright original's size.
    """

    pixels: np.ndarray
    width: int
    height: int


class MemoryBudget:
    """Bytes that threads share; who asks for more than is left waits.

    Args:
        size: of the budget.
    """

    def __init__(self, size: int) -> None:
        self._left = size
        self._changed = Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Hold some of it, at most all."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


def decode_image(data: bytes, config: ImageConfig, memory: MemoryBudget | None = None) -> DecodedImage:
    """Decode the first frame, upright, in RGB, alpha on white, its longer side reduced to `config.max_side`.

    A truncated file is unreadable: its missing part would be grey, and what is shown there would be called absent. A
    JPEG that lacks its end mark alone is whole.

    Args:
        data: the encoded image.
        config: its limits.
        memory: of `config.max_decoding_bytes`, shared with others who decode at the same time.

    Raises:
        ImageError: IMAGE_TOO_LARGE by bytes, or by the pixels that the header claims or the memory that decoding them
            takes, before anything is decoded; IMAGE_UNREADABLE for everything else, saying what the bytes are.
    """
    if not data:
        raise ImageError(ProblemKind.IMAGE_UNREADABLE, "the image is empty (0 bytes)")
    if len(data) > config.max_bytes:
        raise ImageError.over_max_bytes(len(data), config)
    image = _open(data, config)
    width, height = image.size
    try:
        with memory.taken(_taken_bytes(image, config)) if memory else nullcontext():
            orientation, image = _decode_whole(image, data, config)
    except Exception as error:  # Pillow's decoders raise nearly anything on broken or hostile files
        message = f"the {image.format} image is damaged: {str(error) or type(error).__name__}"
        raise ImageError(ProblemKind.IMAGE_UNREADABLE, message) from error
    if orientation in _QUARTER_TURNS:
        width, height = height, width
    return DecodedImage(np.array(image), width, height)  # a copy: views of Pillow images are read-only


def image_suffix(data: bytes, config: ImageConfig) -> str:
    """What a file with this image is named, by its header: `.jpg`, `.png` …; nothing is decoded.

    Raises:
        ImageError: the image has no header that `decode_image` takes.
    """
    kind = _open(data, config).format
    return ".jpg" if kind in _JPEGS else f".{str(kind).lower()}"


class ImageLoader:
    """Stage LOAD_IMAGE: the pixels of posts in which there is something to ground.

    Args:
        config: limits of images, and where they may come from.

    Attributes:
        keeps_encoded: a post that names its image gets its bytes too, so that nobody fetches them again.
        wants: whether the image of a post is loaded at all.
    """

    def __init__(self, config: ImageConfig):
        self._config = config
        self._fetcher = Fetcher(config)
        # Threads of its own: what the allocator keeps for a thread that has decoded, it keeps for few of them.
        self._decoding = ThreadPoolExecutor(_DECODED_AT_ONCE)
        self._memory = MemoryBudget(config.max_decoding_bytes)
        self.keeps_encoded = False
        self.wants: Callable[[Post], bool] = lambda post: True

    @classmethod
    def from_config(cls, config: Config) -> ImageLoader:
        """Built from the `image` section."""
        return cls(config.image)

    @property
    def counts(self) -> dict[str, int]:
        """As `Fetcher.fetched`."""
        return dict(self._fetcher.fetched)

    @property
    def trouble(self) -> str | None:
        """As of `Fetcher`."""
        return self._fetcher.trouble

    def __call__(self, posts: list[Post]) -> list[Post]:
        """Load the image of every post that is not rejected, has entities, and is wanted."""
        self.load_all(post for post in posts if not post.is_rejected and post.entities and self.wants(post))
        return posts

    def load_all(self, posts: Iterable[Post]) -> None:
        """As `load`, for many: while some images are decoded, others are on their way.

        Only `image.fetch_concurrency` encoded images are in memory at a time, besides those that the posts bring.
        """
        with ThreadPoolExecutor(self._config.fetch_concurrency) as pool:
            list(pool.map(self.load, posts))

    def load(self, post: Post) -> None:
        """Fill `image`, `image_width` and `image_height`, or record the problem; once a post has either, do nothing."""
        if post.image is not None or post.lacks_image:
            return
        try:
            encoded = self._encoded(post)
            decoded = self._decoding.submit(decode_image, encoded, self._config, self._memory).result()
        except ImageError as error:
            post.fail("load_image", error.kind, str(error))
            return
        post.image, post.image_width, post.image_height = decoded.pixels, decoded.width, decoded.height
        if self.keeps_encoded:
            post.image_bytes = encoded

    def _encoded(self, post: Post) -> bytes:
        if post.image_bytes is not None:
            return post.image_bytes
        if post.image_uri is None:
            raise ImageError(ProblemKind.IMAGE_MISSING, "the post has neither image nor image_uri")
        return self._fetcher.fetch(post.image_uri)


def _open(data: bytes, config: ImageConfig) -> Image.Image:
    """Read the header and check the size it claims."""
    try:
        image = _opened(_without_metadata(data))
    except Image.DecompressionBombError as error:  # some formats ask Pillow's own limit, which the process sets
        raise ImageError(ProblemKind.IMAGE_TOO_LARGE, f"Pillow refuses the image by its own limit: {error}") from error
    except Exception as error:  # headers of no known format, or damaged: Pillow raises nearly anything
        raise ImageError(ProblemKind.IMAGE_UNREADABLE, _what_it_is(data)) from error
    width, height = image.size
    if width * height > config.max_pixels:
        raise ImageError(
            ProblemKind.IMAGE_TOO_LARGE,
            f"the image has {width} × {height} = {width * height:,} pixels; image.max_pixels allows "
            f"{config.max_pixels:,}",
        )
    if image.format in _JPEGS and (scans := count_scans(data)) > _MAX_SCANS:
        message = f"the JPEG image has {scans:,} scans; at most {_MAX_SCANS} are decoded"
        raise ImageError(ProblemKind.IMAGE_TOO_LARGE, message)
    if (size := _decoding_bytes(image)) > config.max_decoding_bytes:
        raise ImageError(
            ProblemKind.IMAGE_TOO_LARGE,
            f"the {image.format} image has {width} × {height} pixels, and decoding them takes about {size:,} bytes; "
            f"image.max_decoding_bytes allows {config.max_decoding_bytes:,}",
        )
    return image


def _opened(data: bytes) -> Image.Image:
    """As `Image.open`, but for its limit: it would refuse what a larger `image.max_pixels` admits.

    The limit is of the whole process, which may not be ours, so that it cannot be lifted.
    """
    Image.init()
    for kind in _FORMATS:
        opened, accepts = Image.OPEN[kind]
        if accepts is None or accepts(data[:_MAGIC_BYTES]) is True:
            return opened(BytesIO(data), "")
    raise UnidentifiedImageError


def _taken_bytes(image: Image.Image, config: ImageConfig) -> int:
    """An AVIF is decoded alone: the pictures inside may have more pixels than its header says."""
    return config.max_decoding_bytes if image.format == "AVIF" else _decoding_bytes(image)


def _decoding_bytes(image: Image.Image) -> int:
    """What decoding takes by the header; a TIFF's tile is in memory whole, and may be larger than the image."""
    pixels = image.width * image.height * BYTES_PER_PIXEL[str(image.format)]
    return pixels + (_tile_bytes(image) if isinstance(image, TiffImageFile) else 0)


def _tile_bytes(image: TiffImageFile) -> int:
    tags = image.tag_v2
    sides = tags.get(TILEWIDTH, 0), tags.get(TILELENGTH, 0)
    return math.prod(sides) * sum(tags.get(BITSPERSAMPLE, (1,))) // 8


def _without_metadata(data: bytes) -> bytes:
    """A PNG without its large texts and its colour profile, which Pillow unpacks, and gives the picture up for.

    Small plain texts stay: one of them may say which side is up.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return data
    kept, place = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while place < len(data):
        length = int.from_bytes(data[place : place + 4])
        kind, end = data[place + 4 : place + 8], place + length + _PNG_CHUNK_FRAME
        is_compressed = kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and _is_packed(data[place + 8 : end]))
        if not (is_compressed or (kind in (b"tEXt", b"iTXt") and length > _MAX_PNG_TEXT)):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _is_packed(text: bytes) -> bool:
    return text[text.find(b"\0") + 1 :][:1] == b"\1"


def _decode_whole(image: Image.Image, data: bytes, config: ImageConfig) -> tuple[int, Image.Image]:
    """As `_decode`, with the end mark that a JPEG lacks, if that is all it lacks.

    Decoders make up what is missing before an end mark. So a second picture is made, of a file that goes on before its
    mark: the two are the same if nothing was missing.
    """
    if image.format not in _JPEGS or not is_cut_off(data):
        return _decode(image, config.max_side)
    orientation, image = _decode(_open(with_end(data), config), config.max_side)
    _, continued = _decode(_open(with_end(data, goes_on=True), config), config.max_side)
    if not has_all_scans(data) or image.tobytes() != continued.tobytes():
        raise EOFError("it is cut off, and pixels are missing")
    return orientation, image


def _decode(image: Image.Image, max_side: int) -> tuple[int, Image.Image]:
    size = _reduced(image.size, max_side)
    # JPEG only: decode at 1/2, 1/4 or 1/8, never below `size`. The last column and row then stand for less than a
    # pixel: `box` is what the picture fills, and without it places would shift towards the lower right.
    drafted = image.draft(None, size)
    box = drafted[1] if drafted else None
    orientation = _orientation(image)
    image.load()
    if image.mode in ("I", "F"):  # reduced first: stretching takes many times the memory of the pixels
        image = image.resize(size, Image.Resampling.BICUBIC)
    image = _to_rgb(image)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return orientation, image


def _reduced(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    scale = min(1.0, max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _orientation(image: Image.Image) -> int:
    """As browsers turn images: by EXIF, in a PNG only if it stands before the pixels, and a WebP never.

    Boxes are drawn on images that browsers show. They do not ask XMP, which Pillow does, and which is often left from
    before an edit. A TIFF, which they do not show, is turned by Pillow while it is loaded. For an AVIF, Pillow has put
    what the format itself says in place of what its EXIF says.
    """
    return 1 if image.format == "WEBP" else exif.orientation(image.info.get("exif", b""))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = _stretched(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, "white")
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image.convert("RGB")


def _stretched(image: Image.Image) -> Image.Image:
    """32-bit samples have no agreed white: the image's own extremes become black and white."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8))


def _what_it_is(data: bytes) -> str:
    head = data[:2048].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for magic, name in _UNSUPPORTED:
        if data.startswith(magic):
            return f"this is a {name} image, which is not supported"
    if data[4:8] == b"ftyp" and data[8:12] not in _AVIF_BRANDS:
        heif = data[8:12] in _HEIF_BRANDS
        return "this is a HEIC image, which is not supported" if heif else "this is a video (MP4), not an image"
    if data[4:8] == b"ftyp":
        return "this begins like an AVIF image, but its header is damaged"
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return f"this begins like a {name} image, but its header is damaged"
    if head.startswith((b"<?xml", b"<!--")) and b"<svg" in head:
        return "this is an SVG drawing, not an image of pixels"
    for prefix, name in _MARKUP:
        if head.startswith(prefix):
            return f"this is {name}, not an image" + (" of pixels" if "SVG" in name else "")
    return f"this is not an image in a supported format ({', '.join(_FORMATS)})"
