"""Which side of an image is up, by its EXIF."""

from __future__ import annotations

from functools import partial
from typing import Any

_PREFIX = b"Exif\0\0"
_ORDERS = {b"II*\0": "little", b"MM\0*": "big"}
_ENTRY_BYTES = 12
_ORIENTATION, _SHORT = 0x112, 3


def orientation(exif: bytes) -> int:
    """1 (as it is stored) to 8, as browsers read it: one number of 16 bits in the first directory, else 1.

    Args:
        exif: a TIFF without an image, perhaps behind `Exif` and two zeros.
    """
    tiff = exif.removeprefix(_PREFIX)
    order: Any = _ORDERS.get(tiff[:4])
    if order is None:
        return 1
    number = partial(int.from_bytes, byteorder=order)
    begin = number(tiff[4:8]) + 2
    entries = min(number(tiff[begin - 2 : begin]), len(tiff) // _ENTRY_BYTES)
    for place in range(begin, begin + entries * _ENTRY_BYTES, _ENTRY_BYTES):
        tag, kind = number(tiff[place : place + 2]), number(tiff[place + 2 : place + 4])
        count, value = number(tiff[place + 4 : place + 8]), number(tiff[place + 8 : place + 10])
        if (tag, kind, count) == (_ORIENTATION, _SHORT, 1) and value <= 8:
            return max(1, value)
    return 1
