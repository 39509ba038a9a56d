"""What a clip shows, measured from its frames alone: background, and colour, size class and motion of each thing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import data
import numpy as np
from numpy.typing import NDArray

SMALLEST = 10  # pixels inside the outline: what has fewer in the median frame is no thing
SIZE_LIMIT = math.pi * data.RADIUS["small"] * data.RADIUS["large"]  # between the two areas, geometrically
MOVED = 9.0  # pixels between the ends of a clip; a moving thing covers 19 or more
HOPPED = 6.0
SCATTERED = 0.4  # variance of place over area: at most 0.17 of one shape, 0.7 and more of two apart
GREW = 2.5  # times its first area; a growing thing reaches 6


@dataclass(frozen=True)
class Seen:
    """One thing as measured. `x`, `y` its centroid a frame in pixels, NaN where it cannot be seen.

    size   small, large, scattered where there are several of its colour, or None of what grows.
    """

    colour: str
    size: str | None
    motion: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def look(clip: data.Clip) -> tuple[str, tuple[Seen, ...]]:
    """Background and things, the largest first, of uint8 frames [T, H, W, 3]."""
    border = np.concatenate([clip[:, :2].reshape(-1, 3), clip[:, -2:].reshape(-1, 3)])
    background = _nearest(np.median(border, axis=0), data.BACKGROUNDS)
    palette = np.array([data.BACKGROUNDS[background], *data.COLOURS.values()], dtype=np.float32)
    distance = ((clip[..., None, :].astype(np.float32) - palette) ** 2).sum(axis=-1)
    label = distance.argmin(axis=-1)
    things = []
    for index, colour in enumerate(data.COLOURS, start=1):
        mask = label == index
        area = mask.sum(axis=(1, 2))
        if np.median(_inside(mask).sum(axis=(1, 2))) >= SMALLEST:
            things.append((float(np.median(area)), _measure(colour, mask, area)))
    things.sort(key=lambda pair: -pair[0])
    return background, tuple(seen for _, seen in things)


def _inside(mask_THW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the outline: where antialiasing mixes two colours into a third, no patch is solid."""
    m = mask_THW
    return m[:, 1:-1, 1:-1] & m[:, :-2, 1:-1] & m[:, 2:, 1:-1] & m[:, 1:-1, :-2] & m[:, 1:-1, 2:]


def _measure(colour: str, mask_THW: NDArray[np.bool_], area: NDArray[np.int64]) -> Seen:
    grid = np.arange(mask_THW.shape[1]) + 0.5
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (mask_THW.sum(axis=1) * grid).sum(axis=1) / area
        y = (mask_THW.sum(axis=2) * grid).sum(axis=1) / area
        spread = _variance(_inside(mask_THW)) / area
    motion = _motion(x, y, area)
    size = None if motion == "grow" else "small" if np.median(area) < SIZE_LIMIT else "large"
    if np.nanmedian(spread) > SCATTERED:
        size = "scattered"
    return Seen(colour, size, motion, x, y)


def _variance(mask_THW: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Mean square distance from the centroid in each frame, in pixels."""
    count, total = mask_THW.sum(axis=(1, 2)), np.zeros(len(mask_THW))
    for axis in (1, 2):
        profile, grid = mask_THW.sum(axis=axis), np.arange(mask_THW.shape[3 - axis])
        total += (profile * grid**2).sum(axis=1) / count - ((profile * grid).sum(axis=1) / count) ** 2
    return total


def _motion(x: NDArray[np.float64], y: NDArray[np.float64], area: NDArray[np.int64]) -> str:
    visible = area > 0  # in more than half of the frames, or it would be no thing
    x, y, area = x[visible], y[visible], area[visible]
    if area[-2:].mean() > GREW * area[:2].mean():
        return "grow"
    dx, dy = x[-2:].mean() - x[:2].mean(), y[-2:].mean() - y[:2].mean()
    if math.hypot(dx, dy) >= MOVED:
        return max(data.DIRECTIONS, key=lambda name: _cosine(data.DIRECTIONS[name], (dx, dy)))
    return "bounce" if y.max() - y.min() >= HOPPED else "still"


def _cosine(a: tuple[int, int], b: tuple[float, float]) -> float:
    return (a[0] * b[0] + a[1] * b[1]) / math.hypot(*a)


def _nearest(colour: NDArray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(((np.array(palette[name]) - colour) ** 2).sum()))


def verdict(clip: data.Clip, scene: data.Scene) -> dict[str, bool]:
    """Which attributes of `scene` the clip shows; `all` is colour, size and motion of every thing."""
    background, things = look(clip)
    seen = {thing.colour: thing for thing in things}
    pairs = [(thing, seen.get(thing.colour)) for thing in scene.things]
    right = {
        "background": background == scene.background,
        "colour": set(seen) == {thing.colour for thing in scene.things},
        "size": all(found is not None and found.size == thing.size for thing, found in pairs),
        "motion": all(found is not None and found.motion == thing.motion for thing, found in pairs),
    }
    right["all"] = right["colour"] and right["size"] and right["motion"]
    return right


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """In dB, of 8-bit pictures."""
    return float(-10 * np.log10(np.square((a.astype(np.float64) - b) / 255).mean() + 1e-10))
