"""Image files to pixels and facts.

Owns decoding, orientation and what is refused; resizing is the work of frames.py. Knows nothing of requests: errors
name the path, the caller names the field.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kinema.errors import RequestError
from kinema.schema import MediaFacts

MAX_PIXELS = 178_956_970
"""Largest image read, in pixels (13,377 x 13,377): Pillow's own limit against files that unpack to exhaust memory."""

TURNED = {5, 6, 7, 8}
"""EXIF orientations that exchange width and height."""


def image_facts(path: Path | str) -> MediaFacts:
    """Return size, frames and transparency of an image, having decoded it: a damaged one is found out now, not later.

    The size is that after EXIF rotation. frames is above 1 for an animated image, of which only the first is read.
    Raises RequestError for a missing file, one that does not decode, and more than MAX_PIXELS.
    """
    return read_image(path)[1]


def read_image(path: Path | str) -> tuple[Tensor, MediaFacts]:
    """Return (frame_HWC, facts): RGB uint8, upright, of the first frame. Transparency is dropped, as officially.

    16-bit grey is reduced to 8 bits. Raises RequestError as image_facts does.
    Source: Wan-Video/Wan2.2 generate.py (Apache-2.0): PIL convert("RGB").
    """
    path = Path(path)
    with _opened(path) as image:
        facts = _facts(path, image)
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("I", "F") or upright.mode.startswith("I;16"):
            pixels_HWC = _eight_bits(path, upright)
        else:
            pixels_HWC = np.array(upright.convert("RGB"))
    return torch.from_numpy(pixels_HWC), facts


def _facts(path: Path, image: Image.Image) -> MediaFacts:
    width, height = image.size
    if image.getexif().get(0x0112) in TURNED:
        width, height = height, width
    return MediaFacts(
        path=path,
        kind="image",
        width=width,
        height=height,
        frames=getattr(image, "n_frames", 1),
        has_alpha=image.has_transparency_data,
    )


def _eight_bits(path: Path, image: Image.Image) -> np.ndarray:
    """Pillow's convert("RGB") clips deep grey to white instead of scaling it."""
    grey_HW = np.array(image)
    if image.mode == "F" or grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise _unreadable(path, f"its pixels are not 8 or 16 bit (mode {image.mode})")
    grey_HW = ((grey_HW.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return np.repeat(grey_HW[:, :, None], 3, axis=2)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if path.is_dir():
        raise _unreadable(path, "it is a folder")
    if not path.exists():
        raise RequestError(f"{path} does not exist", "Check the path for spelling.", got=str(path))
    try:
        with warnings.catch_warnings():
            # Pillow warns at half of the limit at which it refuses; the limit is checked here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                yield image
    except (RequestError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _unreadable(path, f"it has more than {MAX_PIXELS:,} pixels; scale it down first") from error
    except Exception as error:  # decoders raise anything at all on damaged bytes
        raise _unreadable(path, str(error) or type(error).__name__) from error


def _unreadable(path: Path, fault: str) -> RequestError:
    hint = "Give a PNG, JPEG, WebP, BMP, TIFF or GIF that other programs open."
    return RequestError(f"{path} cannot be read as an image: {fault}", hint, got=str(path))
