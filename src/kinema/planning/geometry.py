"""Sizes and lengths a Wan model can make, and the nearest ones to what was asked. Pure arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

from kinema.schema import MediaFacts

PATCH = 2
"""Latent cells a token spans, each way."""

TEMPORAL_STRIDE = 4
"""Pixel frames a latent frame spans, after the first."""

SPEECH_MULTIPLE = 64
"""Pixels that the coarsest patch of S2V's motion spans."""

SPATIAL_STRIDE = {"wan2.1": 8, "wan2.2": 16, "flux": 8}
LATENT_CHANNELS = {"wan2.1": 16, "wan2.2": 48, "flux": 16}


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` = 4n+1 pixel frames."""
    return (frames - 1) // TEMPORAL_STRIDE + 1


def whole_frames(count: int) -> int:
    """Return the longest legal length 4n+1 that `count` frames are enough for; 1 at least."""
    return max(1, (count - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1)


def nearest_frames(frames: float) -> tuple[int, ...]:
    """Return the legal lengths 4n+1 on either side of `frames`, nearest first; one where it is legal itself."""
    below = whole_frames(math.floor(frames))
    above = below if below >= frames else below + TEMPORAL_STRIDE
    return tuple(sorted({below, above}, key=lambda n: (abs(n - frames), n)))


def frames_shown(media: MediaFacts, fps: float) -> int:
    """Return how many frames of a video are on display at `fps`: what reading it at that rate gives."""
    if media.seconds is None:
        return media.frames
    seconds, rate = Fraction(media.seconds).limit_denominator(10**6), Fraction(fps).limit_denominator(100_000)
    return max(1, math.ceil(seconds * rate))


def nearest_multiples(length: int, multiple: int) -> tuple[int, ...]:
    """Return the multiples on either side of `length`, nearest first, never 0."""
    below = max(multiple, length // multiple * multiple)
    above = below if below >= length else below + multiple
    return tuple(sorted({below, above}, key=lambda n: (abs(n - length), n)))


def size_by_area(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height) of about `area` pixels at the image's aspect, both multiples of 16.

    Rounded down as the official image-to-video code does.
    Source: Wan-Video/Wan2.2 wan/image2video.py.
    """
    stride = SPATIAL_STRIDE["wan2.1"]
    aspect = height / width
    rows = round(math.sqrt(area * aspect) // stride // PATCH * PATCH)
    columns = round(math.sqrt(area / aspect) // stride // PATCH * PATCH)
    return max(columns, PATCH) * stride, max(rows, PATCH) * stride


def size_within(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height) of the most pixels within `area` at nearly the picture's aspect, both multiples of 16.

    Source: Wan-Video/Wan2.2 wan/modules/animate/preprocess/utils.py, where widths are multiples of 64 by oversight.
    """
    aspect, multiple = width / height, 16
    rows = range(multiple, int(math.sqrt(area / aspect)) + multiple, multiple)
    sizes = {
        (columns // multiple * multiple, row)
        for row in rows
        for columns in (row * aspect, row * aspect + multiple - 1)
        if columns >= multiple and columns // multiple * multiple * row <= area
    }
    best = max(
        sizes, key=lambda size: (size[0] * size[1], -abs(size[0] / size[1] - aspect)), default=(multiple, multiple)
    )
    return int(best[0]), int(best[1])


def size_by_area_speech(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height), multiples of 64, of at most `area` pixels and no more than the image needs; S2V's.

    Of 100 scales from the largest down, the first whose sides, rounded up, fit.
    Source: Wan-Video/Wan2.2 wan/speech2video.py get_size_less_than_area (Apache-2.0).
    """
    if width * height <= area:
        largest, smallest = 1.0, 0.1
    else:
        spare = SPEECH_MULTIPLE - 1
        a, b, c = width * height, spare * (width + height), spare**2 - area
        largest, smallest = math.sqrt(area / a), (-b + math.sqrt(b * b - 2 * a * c)) / (2 * a)
    for step in range(100):
        scale = largest - (largest - smallest) * step / 100
        wide, tall = (math.ceil(int(side * scale) / SPEECH_MULTIPLE) * SPEECH_MULTIPLE for side in (width, height))
        if 0 < wide * tall <= area:
            return wide, tall

    def down(length: float) -> int:
        return max(SPEECH_MULTIPLE, int(length // SPEECH_MULTIPLE) * SPEECH_MULTIPLE)

    wide, tall = down(math.sqrt(area * width / height)), down(math.sqrt(area * height / width))
    return (down(width), down(height)) if wide >= width or tall >= height else (wide, tall)


def size_by_area_wan22(width: int, height: int, area: int) -> tuple[int, int]:
    """Return (width, height) within `area` nearest to the image's aspect, both multiples of 32; TI2V-5B's rule.

    Source: Wan-Video/Wan2.2 wan/utils/utils.py best_output_size.
    """
    multiple = SPATIAL_STRIDE["wan2.2"] * PATCH
    ratio = width / height

    def down(length: float) -> int:
        return max(multiple, int(length // multiple) * multiple)

    wide = down(math.sqrt(area * ratio))
    by_width = (wide, down(area / wide))
    tall = down(math.sqrt(area / ratio))
    by_height = (down(area / tall), tall)

    def distance(size: tuple[int, int]) -> float:
        got = size[0] / size[1]
        return max(ratio / got, got / ratio)

    return by_width if distance(by_width) < distance(by_height) else by_height
