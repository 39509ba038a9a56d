"""Animated WebP, frame by frame to the file: nothing is gathered, and equal frames are not merged away.

Owns the container; Pillow encodes each frame. Source: WebP container specification (RIFF, VP8X, ANIM, ANMF, EXIF).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

HAS_ANIMATION, HAS_EXIF = 0x02, 0x08
DO_NOT_BLEND = 0x02
MOST_PIXELS = 16383  # an edge


def write_animation(
    path: Path, frames: Iterable[np.ndarray], size: tuple[int, int], fps: Fraction, quality: int, exif: bytes = b""
) -> None:
    """Write frames [H, W, 3] uint8 that loop for ever.

    size     width, height in pixels, 16383 at most.
    quality  0 to 100, lossy.
    exif     TIFF data, or b"" for none.

    A frame starts at its time rounded to milliseconds, so that the rate holds over the whole.
    """
    width, height = size
    canvas = _uint24(width - 1) + _uint24(height - 1)
    with path.open("wb") as file:
        flags = HAS_ANIMATION | (HAS_EXIF if exif else 0)
        file.write(b"RIFF\x00\x00\x00\x00WEBP")
        file.write(_chunk(b"VP8X", bytes([flags, 0, 0, 0]) + canvas))
        file.write(_chunk(b"ANIM", b"\x00\x00\x00\xff\x00\x00"))  # black behind, no end of loops
        for index, frame in enumerate(frames):
            duration = round((index + 1) * 1000 / fps) - round(index * 1000 / fps)
            place = _uint24(0) * 2 + canvas + _uint24(duration) + bytes([DO_NOT_BLEND])
            file.write(_chunk(b"ANMF", place + _bitstream(frame, quality)))
        if exif:
            file.write(_chunk(b"EXIF", exif))
        length = file.tell()
        file.seek(4)
        file.write(struct.pack("<I", length - 8))


def _bitstream(frame: np.ndarray, quality: int) -> bytes:
    """The one chunk of a still WebP, without its RIFF header."""
    still = io.BytesIO()
    Image.fromarray(frame).save(still, format="WEBP", quality=quality, method=4)
    return still.getvalue()[12:]


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\x00" * (len(data) % 2)


def _uint24(value: int) -> bytes:
    return value.to_bytes(3, "little")
