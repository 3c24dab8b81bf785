import contextlib
import io
import os
import re
import struct
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from gem_ray.config import Config, ImageConfig
from gem_ray.data.images import ImageError, ImageLoader, MemoryBudget, decode_image
from gem_ray.records import Entity, Post, ProblemKind, Status

CONFIG = ImageConfig()
UNREADABLE, TOO_LARGE = ProblemKind.IMAGE_UNREADABLE, ProblemKind.IMAGE_TOO_LARGE
ENTITY = Entity("Rihanna", 0, 7, 0, 1, "person", "musician", 0.9)


def scene(width=48, height=32):
    """Four corners of four colours: every turn and mirror image is another picture."""
    pixels = np.full((height, width, 3), 128, np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return Image.fromarray(pixels)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def difference(pixels, image):
    return np.abs(pixels.astype(int) - np.asarray(image.convert("RGB")).astype(int)).mean()


def png_header(width, height):
    """A PNG that claims a size and holds one byte of pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0"))
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}),
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("GIF", {}),
        ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
        ("MPO", {"quality": 95, "subsampling": 0}),
    ],
)
def test_formats_give_the_same_picture(kind, options):
    decoded = decode_image(encoded(scene(), kind, **options), CONFIG)
    assert (decoded.width, decoded.height) == (48, 32)
    assert decoded.pixels.dtype == np.uint8
    assert difference(decoded.pixels, scene()) < 3


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(
            (mode, "TIFF")
            for mode in ("1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B", "I", "F", "LAB")
        ),
        *((mode, "PNG") for mode in ("1", "L", "P", "LA", "RGBA", "I;16")),
    ],
)
def test_every_pixel_mode_gives_rgb(mode, kind):
    decoded = decode_image(encoded(Image.new(mode, (48, 32)), kind), CONFIG)
    assert decoded.pixels.shape == (32, 48, 3)
    assert (decoded.pixels == decoded.pixels[0, 0]).all()


def test_cmyk_jpeg_keeps_its_colours():
    data = encoded(scene().convert("CMYK"), "JPEG", quality=95, subsampling=0)
    assert difference(decode_image(data, CONFIG).pixels, scene()) < 6


def test_palette_with_a_transparent_colour_lies_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    pixels = decode_image(encoded(image, "PNG", transparency=0), CONFIG).pixels
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(kind):
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 128))
    image.putpixel((2, 0), (10, 20, 30, 255))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_image(encoded(image, kind, **options), CONFIG).pixels
    expected = [[255] * 3, [round(255 + (c - 255) * 128 / 255) for c in (200, 0, 0)], [10, 20, 30]]
    np.testing.assert_allclose(pixels[0], expected, atol=1)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    pixels = decode_image(encoded(Image.fromarray(values), kind), CONFIG).pixels
    assert pixels[0, :, 0].tolist() == [0, 1, 128, 255]


def test_float_samples_are_stretched_between_their_extremes():
    values = np.array([[-1.0, 0.0, 1.0, np.nan]], np.float32)
    pixels = decode_image(encoded(Image.fromarray(values), "TIFF"), CONFIG).pixels
    assert pixels[0, :, 1].tolist() == [0, 127, 255, 127]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone_as_pillow_undoes_it(kind, orientation):
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}.get(kind, {})
    data = encoded(scene(), kind, exif=exif_of(orientation), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data, CONFIG)
    assert (decoded.width, decoded.height) == upright.size
    assert (decoded.width < decoded.height) == (orientation >= 5)
    assert difference(decoded.pixels, upright) < 1


def png_with_exif_behind_its_pixels():
    begin, rest = encoded(scene(), "PNG", exif=exif_of(6)).split(b"IDAT")
    chunk = begin[begin.index(b"eXIf") - 4 : -4]
    return begin.replace(chunk, b"") + b"IDAT" + rest[:-12] + chunk + rest[-12:]


def png_with_exif_as_text():
    """As ImageMagick wrote it before there was a chunk for it."""
    exif, info = b"Exif\0\0" + exif_of(6).tobytes().removeprefix(b"Exif\0\0"), PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n")
    return encoded(scene(), "PNG", pnginfo=info)


def tiff_of(kind, count, value):
    """An orientation of 6 or whatever else, as one entry of a directory: of its kind, so often."""
    return b"II*\0" + struct.pack("<IHHHI", 8, 1, 0x112, kind, count) + value.ljust(4, b"\0") + bytes(4)


@pytest.mark.parametrize(
    ("exif", "is_turned"),
    [
        (tiff_of(3, 1, b"\6"), True),
        (tiff_of(3, 1, b"\6")[:-4], True),  # cut off behind the entry
        (tiff_of(3, 1, b"\6").replace(b"\1\0\x12\1", b"\7\0\x12\1"), True),  # fewer entries than it says
        (tiff_of(3, 1, b"\x09"), False),
        (tiff_of(3, 1, b"\0"), False),
        (tiff_of(4, 1, b"\6"), False),
        (tiff_of(8, 1, b"\6"), False),
        (tiff_of(2, 2, b"6"), False),
        (tiff_of(3, 2, b"\6\0\6"), False),
        (tiff_of(3, 1, b"\6").replace(b"*", b"+"), False),
    ],
)
def test_exif_is_read_as_browsers_read_it(exif, is_turned):
    """Compared with Chromium 156."""
    decoded = decode_image(encoded(scene(), "JPEG", exif=b"Exif\0\0" + exif), CONFIG)
    assert (decoded.width < decoded.height) == is_turned


@pytest.mark.parametrize(
    "data",
    [
        encoded(scene(), "WEBP", exif=exif_of(6)),
        encoded(scene(), "WEBP", exif=exif_of(6), lossless=True),
        png_with_exif_behind_its_pixels(),
        png_with_exif_as_text(),
    ],
)
def test_exif_that_turns_no_image_in_browsers_turns_none_here(data):
    assert Image.open(io.BytesIO(data)).getexif()[0x112] == 6
    decoded = decode_image(data, CONFIG)
    assert (decoded.width, decoded.height) == scene().size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_xmp_turns_no_image_as_it_turns_none_in_browsers(kind):
    xmp = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    data = encoded(scene(), kind, **({"pnginfo": info} if kind == "PNG" else {"xmp": xmp.encode()}))
    assert Image.open(io.BytesIO(data)).getexif()[0x112] == 6
    decoded = decode_image(data, CONFIG)
    assert (decoded.width, decoded.height) == scene().size


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + b"\xff" * 40, b"\0"])
def test_damaged_exif_is_no_rotation(exif):
    decoded = decode_image(encoded(scene(), "JPEG", exif=exif, quality=95), CONFIG)
    assert (decoded.width, decoded.height) == (48, 32)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    pixels = decode_image(data, CONFIG).pixels
    np.testing.assert_allclose(pixels[4, 4], (255, 0, 0), atol=4)


@pytest.mark.parametrize(
    ("size", "reduced"),
    [
        ((3000, 1500), (256, 128)),
        ((1500, 3000), (128, 256)),
        ((256, 10), (256, 10)),
        ((5, 5),) * 2,
        ((4000, 1), (256, 1)),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_longer_side_is_reduced_and_never_enlarged(size, reduced, kind):
    decoded = decode_image(encoded(scene(*size), kind), ImageConfig(max_side=256))
    assert decoded.pixels.shape == (reduced[1], reduced[0], 3)
    assert (decoded.width, decoded.height) == size


def test_reducing_while_decoding_gives_what_reducing_afterwards_gives():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (30, 40, 3), np.uint8)).resize((1603, 1201), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    exact = Image.open(io.BytesIO(data)).convert("RGB").resize((200, 150), Image.Resampling.BICUBIC)
    assert difference(decode_image(data, ImageConfig(max_side=200)).pixels, exact) < 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_unreadable(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    for part in (0.02, 0.5, 0.9):
        with pytest.raises(ImageError) as caught:
            decode_image(data[: int(len(data) * part)], CONFIG)
        assert caught.value.kind is UNREADABLE


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"restart_marker_blocks": 2}),
        ("JPEG", {"restart_marker_rows": 1, "progressive": True}),
        ("MPO", {}),
    ],
)
def test_a_jpeg_may_lack_its_end_mark_and_nothing_more(kind, options):
    """Some cameras write none, and some sites cut it off."""
    data = encoded(Image.effect_noise((150, 70), 90), kind, **options)
    whole = decode_image(data, CONFIG).pixels
    for cut in (1, 2):
        assert (decode_image(data[:-cut], CONFIG).pixels == whole).all()
    restarts = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", data)]
    for end in (*range(-3, -300, -7), *restarts, len(data) // 2):
        with pytest.raises(ImageError, match="is damaged: "):
            decode_image(data[:end], CONFIG)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_damaged_bytes_give_pixels_or_an_image_error(kind):
    rng = np.random.default_rng(1)
    data = np.frombuffer(encoded(scene(), kind), np.uint8)
    for _ in range(60):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
        with contextlib.suppress(ImageError):
            assert decode_image(damaged.tobytes(), ImageConfig(max_pixels=10**6)).pixels.shape[2] == 3


@pytest.mark.parametrize("size", [(20_000, 20_000), (11_000, 11_000), (2**31 - 1, 2**31 - 1)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    with pytest.raises(ImageError, match=r"image\.max_pixels allows 120,000,000") as caught:
        decode_image(png_header(*size), CONFIG)
    assert caught.value.kind is TOO_LARGE


def test_a_webp_of_a_few_bytes_that_claims_many_pixels_is_refused():
    data = bytearray(encoded(Image.new("RGB", (1, 1)), "WEBP", lossless=True))
    place = data.index(b"VP8L") + 9  # 14 bits of width - 1, then of height - 1
    bits = int.from_bytes(data[place : place + 4], "little") & ~(2**28 - 1)
    data[place : place + 4] = (bits | 16382 | 16382 << 14).to_bytes(4, "little")
    for limits in (CONFIG, ImageConfig(max_pixels=2**30)):
        with pytest.raises(ImageError, match=f"{16383**2}") as caught:
            decode_image(bytes(data), limits)
        assert caught.value.kind is TOO_LARGE


def test_the_limit_of_pillow_belongs_to_the_process(monkeypatch):
    assert Image.MAX_IMAGE_PIXELS == 2**30 // 4 // 3  # Pillow's own
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(encoded(scene(), "PNG"), CONFIG).width == 48
    with pytest.raises(ImageError, match="Pillow refuses") as caught:
        decode_image(encoded(scene(), "WEBP"), CONFIG)
    assert caught.value.kind is TOO_LARGE
    assert Image.MAX_IMAGE_PIXELS == 100


def test_strangers_get_fewer_pixels():
    assert Config().online_image.max_pixels == 25_000_000 < Config().image.max_pixels
    assert Config(image={"max_pixels": 1000}).online_image.max_pixels == 1000


def test_too_many_bytes_or_pixels_are_refused():
    data = encoded(scene(), "PNG")
    with pytest.raises(ImageError, match=r"48 × 32 = 1,536 pixels") as caught:
        decode_image(data, ImageConfig(max_pixels=1535))
    assert caught.value.kind is TOO_LARGE
    with pytest.raises(ImageError, match="bytes") as caught:
        decode_image(data, ImageConfig(max_bytes=len(data) - 1))
    assert caught.value.kind is TOO_LARGE
    decode_image(data, ImageConfig(max_pixels=1536, max_bytes=len(data)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"\0" * 100, "not an image in a supported format"),
        (b"hello", "not an image in a supported format"),
        (b"\n<!DOCTYPE html><html><body>404", "an HTML page"),
        (b"\xef\xbb\xbf<HTML>", "an HTML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<!-- x -->\n<svg/>', "an SVG drawing"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
        (b'{"error": "not found"}', "a JSON document"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript document"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC image"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", r"a video \(MP4\)"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "begins like an AVIF image"),
        (b"\xff\x0a\0\0", "a JPEG XL image, which is not supported"),
        (b"8BPS\0\1", "a Photoshop image, which is not supported"),
        (b"\x1aE\xdf\xa3\x01\0", "a WebM or Matroska video"),
        (b"PK\x03\x04\x14\0", "a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\xff\xd8\xff\xe0", "begins like a JPEG image"),
        (b"\x89PNG\r\n\x1a\n", "begins like a PNG image"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(data, message):
    with pytest.raises(ImageError, match=message) as caught:
        decode_image(data, CONFIG)
    assert caught.value.kind is UNREADABLE


def test_formats_that_posts_do_not_bring_are_not_opened():
    for kind in ("PPM", "TGA", "ICO", "PCX", "EPS"):
        with pytest.raises(ImageError):
            decode_image(encoded(scene(), kind), CONFIG)


def test_only_posts_with_something_to_ground_are_loaded_and_failures_stay_alone(tmp_path):
    data = encoded(scene(), "PNG")
    (tmp_path / "wrong-extension.gif").write_bytes(data)
    posts = [
        Post("bytes", "Rihanna", entities=[ENTITY], image_bytes=data),
        Post("broken", "Rihanna", entities=[ENTITY], image_bytes=data[:60]),
        Post("nothing to ground", "Rihanna", image_bytes=data),
        Post("path", "Rihanna", entities=[ENTITY], image_uri="wrong-extension.gif"),
        Post("neither", "Rihanna", entities=[ENTITY]),
        Post("empty", "Rihanna", entities=[ENTITY], image_bytes=b""),
        Post("rejected", "Rihanna", entities=[ENTITY], image_bytes=data),
    ]
    posts[-1].fail("tag", ProblemKind.STAGE_FAILED, "no tags")
    loader = ImageLoader.from_config(Config(image={"root": tmp_path}))
    assert loader(posts) is posts
    loaded = [post.post_id for post in posts if post.image is not None]
    assert loaded == ["bytes", "path"]
    assert (posts[0].image_width, posts[0].image_height) == (48, 32)
    assert [post.status for post in posts] == [
        Status.OK, Status.DEGRADED, Status.OK, Status.OK, Status.DEGRADED, Status.DEGRADED, Status.REJECTED,
    ]  # fmt: skip
    assert [(p.stage, p.kind) for p in posts[1].problems] == [("load_image", UNREADABLE)]
    assert posts[4].problems[0].kind is ProblemKind.IMAGE_MISSING
    problems = [list(post.problems) for post in posts]
    loader(posts)
    assert [post.problems for post in posts] == problems


def post_of(uri, entities=(ENTITY,)):
    return Post(uri, "Rihanna", entities=list(entities), image_uri=uri)


def test_images_in_s3_are_loaded_in_order_and_failures_stay_alone(s3, faulty_s3):
    bucket = s3.bucket("photos")
    uris = [s3.put(f"{bucket}/{width}.png", encoded(scene(width, 8), "PNG")) for width in range(1, 31)]
    s3.put(f"{bucket}/broken.png", encoded(scene(), "PNG")[:60])
    s3.put(f"{bucket}/private/a.png", encoded(scene(), "PNG"))
    s3.forbid(f"{bucket}/private/*", "s3:GetObject")
    bad = {
        f"{bucket}/broken.png": UNREADABLE,
        f"{bucket}/none.png": ProblemKind.IMAGE_MISSING,
        f"{bucket}/private/a.png": ProblemKind.IMAGE_FORBIDDEN,
        "s3://no-such-bucket/a.png": ProblemKind.IMAGE_MISSING,
    }
    faulty_s3.share, faulty_s3.kinds, faulty_s3.stall_s = 0.3, ["slow_down", "reset", "cut", "stall"], 0.5
    posts = [post_of(uri) for uri in [*uris[:15], *bad, *uris[15:]]]
    ImageLoader(ImageConfig())(posts)
    good = posts[:15] + posts[-15:]
    assert [(post.image_width, post.status) for post in good] == [(width, Status.OK) for width in range(1, 31)]
    assert [[problem.kind for problem in post.problems] for post in posts[15:19]] == [[kind] for kind in bad.values()]
    assert faulty_s3.faults >= 3


def test_images_of_posts_without_entities_are_not_fetched(s3, faulty_s3):
    uri = s3.put(f"{s3.bucket('photos')}/a.png", encoded(scene(), "PNG"))
    rejected = post_of(uri)
    rejected.fail("tag", ProblemKind.STAGE_FAILED, "no tags")
    posts = [post_of(uri, []), post_of(uri), rejected, post_of(uri, [])]
    ImageLoader(ImageConfig())(posts)
    assert [post.image is not None for post in posts] == [False, True, False, False]
    assert faulty_s3.counts.total() == 1


@pytest.mark.parametrize(("concurrency", "least"), [(1, 1), (3, 2), (16, 4)])
def test_images_are_fetched_side_by_side(s3, faulty_s3, concurrency, least):
    uri = s3.put(f"{s3.bucket('photos')}/a.png", encoded(scene(), "PNG"))
    faulty_s3.plan, faulty_s3.stall_s = ["stall"] * 16, 1 if concurrency > 1 else 0
    posts = [post_of(uri) for _ in range(16)]
    ImageLoader(ImageConfig(fetch_concurrency=concurrency))(posts)
    assert all(post.image is not None for post in posts)
    # The next request may come before the proxy has noticed that it is done with the last.
    assert least <= faulty_s3.at_once <= 2 * concurrency


def test_a_batch_of_encoded_images_is_never_all_in_memory(s3):
    data = encoded(scene(1000, 1000), "BMP")
    uri = s3.put(f"{s3.bucket('photos')}/a.bmp", data)
    loader = ImageLoader(ImageConfig(fetch_concurrency=2, max_side=16))
    loader([post_of(uri)])  # libraries and connections are there
    posts = [post_of(uri) for _ in range(40)]
    tracemalloc.start()
    loader(posts)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(post.image is not None for post in posts)
    assert peak < len(posts) * len(data) / 3


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt", "iCCP"])
@pytest.mark.parametrize("size", [10, 3 * 2**20, 80 * 2**20])
def test_a_picture_is_whole_whatever_is_written_beside_it(kind, size):
    """ComfyUI, Photoshop and Krita write megabytes of texts into PNGs."""
    image, info, options = Image.new("RGB", (9, 5), "red"), PngInfo(), {}
    if kind == "iCCP":
        options["icc_profile"] = bytes(size)
    elif kind == "iTXt":
        info.add_itxt("workflow", "x" * size, zip=True)
    elif size < 30 * 2**20 or kind == "zTXt":
        info.add_text("workflow", "x" * size, zip=kind == "zTXt")
    exif = Image.Exif()
    exif[0x112] = 6
    decoded = decode_image(encoded(image, "PNG", pnginfo=info, exif=exif, **options), CONFIG)
    assert decoded.pixels.shape == (9, 5, 3)  # upright
    assert decoded.pixels[0, 0].tolist() == [255, 0, 0]


def test_a_cut_png_with_texts_is_still_damaged():
    info = PngInfo()
    info.add_text("workflow", "x" * 3 * 2**20, zip=True)
    data = encoded(Image.effect_noise((50, 50), 9), "PNG", pnginfo=info)
    for end in (len(data) - 40, 40, 9):
        with pytest.raises(ImageError, match=r"damaged"):
            decode_image(data[:end], CONFIG)


@pytest.mark.parametrize(("kind", "factor"), [("PNG", 14), ("WEBP", 22), ("GIF", 11), ("JPEG", 8)])
def test_an_image_whose_decoding_takes_too_much_is_refused_by_its_header(kind, factor):
    data = encoded(Image.new("RGB", (100, 50)), kind)
    decode_image(data, ImageConfig(max_decoding_bytes=5000 * factor))
    with pytest.raises(ImageError, match=r"100 × 50 pixels, .*image\.max_decoding_bytes allows") as caught:
        decode_image(data, ImageConfig(max_decoding_bytes=5000 * factor - 1))
    assert caught.value.kind is TOO_LARGE


def tile_larger_than_its_image(side):
    """A TIFF of 16 × 16 pixels that lies in a tile of `side` × `side`."""
    values = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8 + 2 + 12 * 10 + 4}
    pixels = zlib.compress(bytes(side * side))
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**values, 325: len(pixels)}.items())
    return b"II*\0" + struct.pack("<IH", 8, 10) + tags + bytes(4) + pixels


def test_a_tile_that_is_larger_than_its_image_counts():
    data = tile_larger_than_its_image(512)
    assert decode_image(data, CONFIG).pixels.shape == (16, 16, 3)
    with pytest.raises(ImageError, match="decoding them takes about") as caught:
        decode_image(data, ImageConfig(max_decoding_bytes=512**2))
    assert caught.value.kind is TOO_LARGE


def test_an_avif_is_decoded_alone_for_its_header_may_claim_too_little():
    taken = []

    class Budget:
        def taken(self, size):
            taken.append(size)
            return contextlib.nullcontext()

    for kind in ("AVIF", "PNG"):
        decode_image(encoded(scene(), kind), CONFIG, Budget())
    assert taken == [CONFIG.max_decoding_bytes, 48 * 32 * 14]


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_jpeg_of_very_many_scans_is_refused(kind):
    data = encoded(scene(), kind, progressive=True)
    begin, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    decode_image(data, CONFIG)
    decode_image(data + data[begin:] * 200, CONFIG)  # a phone's video behind the picture
    with pytest.raises(ImageError, match=r"2\d\d scans; at most 100 are decoded") as caught:
        decode_image(data[:end] + data[begin:end] * 200 + data[end:], CONFIG)
    assert caught.value.kind is TOO_LARGE


def test_what_is_decoded_at_once_fits_the_memory():
    """Whatever order they come in, and whoever fails."""
    budget, held, most = MemoryBudget(100), [], []

    def hold(size):
        with contextlib.suppress(ZeroDivisionError), budget.taken(size):
            held.append(size)
            most.append(sum(held))
            time.sleep(0.001)
            held.remove(size)
            1 / (size % 7)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(hold, [7, 30, 50, 100, 60, 1, 14, 99] * 8))
    assert len(most) == 64
    assert max(most) <= 100


def test_few_threads_decode_however_many_fetch(monkeypatch):
    """What the allocator keeps for each thread that has decoded adds up: 270 MiB after 12 large WebPs in 16 threads."""
    seen = set()

    def noting(*arguments):
        seen.add(threading.get_ident())
        time.sleep(0.002)
        return decode_image(*arguments)

    monkeypatch.setattr("gem_ray.data.images.decode_image", noting)
    loader = ImageLoader(ImageConfig(fetch_concurrency=16))
    for _ in range(3):
        posts = [Post("p", "t", ["t"], image_bytes=encoded(scene(), "PNG"), entities=[ENTITY]) for _ in range(30)]
        assert all(post.image is not None for post in loader(posts))
    assert threading.get_ident() not in seen
    assert len(seen) <= min(8, os.cpu_count() or 1)


def test_pillow_takes_blocks_that_the_system_gets_back():
    """glibc keeps freed blocks of up to 32 MiB for the thread that had them; `jobs/benchmark.py decoding` shows it."""
    assert Image.core.get_block_size() > 32 * 2**20
