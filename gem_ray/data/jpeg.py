"""The first picture of a JPEG by its markers: how many scans it has, and whether it is cut off."""

from __future__ import annotations

import re
from collections.abc import Iterator

_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")  # not those without content, which stand among the pixels
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_FRAMES = (b"\xc0", b"\xc1", b"\xc2", b"\xc9", b"\xca")
_SCAN, _END = b"\xda", b"\xd9"
_COEFFICIENTS = 64  # of a block, for each colour
# Decoders go on with zeros where pixels are missing: this begins otherwise, in its first bit.
_MORE_PIXELS = b"\xb6\x5a\xa7\x1c" * 8


def count_scans(jpeg: bytes) -> int:
    """How often it goes over its pixels."""
    return sum(marker == _SCAN for marker, _ in _segments(jpeg))


def is_cut_off(jpeg: bytes) -> bool:
    """Whether it has no end mark."""
    return all(marker != _END for marker, _ in _segments(jpeg))


def has_all_scans(jpeg: bytes) -> bool:
    """Whether there are scans for all bits of all coefficients; the last scan may be cut off.

    Raises:
        ValueError, IndexError: a marker is damaged.
    """
    left: set[tuple[int, int]] = set()
    for marker, content in _segments(jpeg):
        if marker in _FRAMES:
            left = {(colour, number) for colour in content[6::3] for number in range(_COEFFICIENTS)}
        elif marker == _SCAN:
            colours, (first, last, bits) = content[1 : 2 * content[0] : 2], content[-3:]
            if bits % 16 == 0:  # none of the lower bits are left to a later scan
                left -= {(colour, number) for colour in colours for number in range(first, last + 1)}
    return not left


def with_end(jpeg: bytes, goes_on: bool = False) -> bytes:
    """One that is cut off, with an end mark.

    Args:
        jpeg: it may end with the first half of the mark.
        goes_on: before the end there is what might be more pixels, also behind the mark at which decoders would start
            anew.
    """
    there, more = jpeg.rstrip(b"\xff"), b""
    if goes_on:
        restarts = _RESTART.findall(there, there.rfind(b"\xff" + _SCAN))
        number = int.from_bytes(restarts[-1]) + 1 if restarts else 0
        more = _MORE_PIXELS + bytes((0xFF, 0xD0 + number % 8)) + _MORE_PIXELS
    return there + more + b"\xff" + _END


def _segments(jpeg: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The kinds of its markers, the end mark included, and what they bring."""
    place = 2
    while marker := _MARKER.search(jpeg, place):
        begin = marker.end()
        place = begin + int.from_bytes(jpeg[begin : begin + 2])
        if marker[1] == _END:
            yield _END, b""
            return
        if place <= len(jpeg):
            yield marker[1], jpeg[begin + 2 : place]
