"""Which format a file is in: by its name where that says so, else by its first bytes."""

from __future__ import annotations

import zlib
from enum import StrEnum
from pathlib import PurePosixPath

HEAD_BYTES = 8192  # how much of a file `format_of_head` needs


class Format(StrEnum):
    """What a shard can be."""

    PARQUET = "Parquet file"
    TAR = "WebDataset tar"


PARQUET_SUFFIXES = (".parquet", ".parq", ".pq")
TAR_SUFFIXES = (".tar", *(f".tar.{packed}" for packed in ("gz", "bz2", "xz", "zst")), ".tgz", ".tbz2", ".txz", ".tzst")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

# Files that lie beside shards; there may be millions of them, and a look into each would cost a request.
_TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".md", ".html", ".xml", ".yaml", ".yml", ".log")
_OTHER_SUFFIXES = (*IMAGE_SUFFIXES, *_TEXT_SUFFIXES, ".crc", ".npy", ".npz")

LFS_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not brought

_PARQUET_MAGIC = b"PAR1"
_USTAR = slice(257, 262)
_COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"BZh", "bz2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ",
                b"\xff\x0a", b"\0\0\0\x0cJXL ")  # fmt: skip


def format_of_name(path: str) -> Format | None:
    """What a file's suffix says, in upper or lower case; None if it says nothing of shards."""
    name = path.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return Format.PARQUET
    return Format.TAR if name.endswith(TAR_SUFFIXES) else None


def is_other_name(path: str) -> bool:
    """Whether the suffix is one of another kind of file, so that nobody needs to look into it."""
    return path.lower().endswith(_OTHER_SUFFIXES)


def format_of_head(head: bytes) -> Format | None:
    """What a file's first `HEAD_BYTES` say; None if it is not a shard."""
    if head.startswith(_PARQUET_MAGIC):
        return Format.PARQUET
    return Format.TAR if unpacked_head(head)[_USTAR] == b"ustar" else None


def compression_of(head: bytes) -> str | None:
    """By its first bytes: `gzip`, `bz2`, `xz` or `zstd`; None if it is none of them."""
    return next((name for magic, name in _COMPRESSIONS if head.startswith(magic)), None)


def unpacked_head(head: bytes) -> bytes:
    """The beginning of what is gzipped in a file that begins so; else `head` itself."""
    if compression_of(head) != "gzip":
        return head
    try:
        return zlib.decompressobj(31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return b""


def looks_like_image(head: bytes) -> bool:
    """Whether bytes begin as images do, also those that are not supported: the decoder names these."""
    is_container = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    is_heif = head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"avi", b"mif", b"msf")
    return is_container or is_heif or head.startswith(_IMAGE_MAGIC)


def is_hidden(path: PurePosixPath) -> bool:
    """Whether readers of tables leave it out: `_…` and `.…`, but not partitions (`_date=2024-01-01`)."""
    parts = (part for part in path.parts if part not in (".", ".."))
    return any(part.startswith(".") or (part.startswith("_") and "=" not in part) for part in parts)
