"""Captioned clips of coloured shapes, drawn by numpy: the world the demo model knows.

A clip is a function of its seed alone. Captions follow one fixed grammar with a few paraphrases.
Attribute combinations whose hash falls into one slot of ten are never drawn for training (`held_out`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

EDGE = 64
FRAMES = 17

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (50, 205, 60),
    "blue": (60, 110, 250),
    "yellow": (245, 225, 50),
    "magenta": (230, 70, 225),
    "cyan": (60, 225, 230),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "gray": (120, 120, 120),
    "navy": (20, 25, 100),
    "brown": (105, 60, 25),
    "dark green": (15, 80, 35),
    "purple": (80, 25, 110),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
RADIUS = {"small": 6.0, "large": 11.0}  # of the circle of equal area, in pixels
DIRECTIONS: dict[str, tuple[int, int]] = {  # unit steps to the right and down
    "right": (1, 0),
    "left": (-1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and to the right": (1, -1),
    "up and to the left": (-1, -1),
    "down and to the right": (1, 1),
    "down and to the left": (-1, 1),
}
MOTIONS = (*DIRECTIONS, "bounce", "grow", "still")
HOP = 16.0  # height of a bounce in pixels; two a clip
GROWTH = (5.0, 12.5)  # radius at the first and at the last frame of a growing shape

Split = Literal["train", "held_out"]
Clip = NDArray[np.uint8]  # [T, H, W, 3]


@dataclass(frozen=True)
class Thing:
    """One shape. size is None exactly when it grows."""

    colour: str
    shape: str
    size: str | None
    motion: str

    @property
    def words(self) -> str:
        return " ".join(filter(None, (self.size, self.colour, self.shape)))


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str

    @property
    def held_out(self) -> bool:
        """True for one combination of attributes in ten; the paraphrase does not matter."""
        keys = [f"{thing.words}/{thing.motion}/{self.background}" for thing in self.things]
        return any(zlib.crc32(key.encode()) % 10 == 0 for key in keys)


def random_scene(rng: np.random.Generator, split: Split, things: int) -> Scene:
    """A scene of one or two things of different colours."""
    while True:
        colours = rng.choice(list(COLOURS), size=things, replace=False)
        sizes = ["small", "large"]
        rng.shuffle(sizes)
        if things == 2 and rng.random() < 0.5:
            sizes = ["small", "small"]
        drawn = []
        for colour, size in zip(colours, sizes, strict=False):
            motion = str(rng.choice(MOTIONS if things == 1 else [m for m in MOTIONS if m != "grow"]))
            shape = str(rng.choice(SHAPES))
            drawn.append(Thing(str(colour), shape, None if motion == "grow" else size, motion))
        scene = Scene(tuple(drawn), str(rng.choice(list(BACKGROUNDS))))
        if scene.held_out == (split == "held_out"):
            return scene


_VERBS = {
    "grow": ("grows", "gets bigger"),
    "bounce": ("bounces", "bounces up and down"),
    "still": ("stands still", "stays in place"),
}


def phrases(scene: Scene, rng: np.random.Generator | None = None) -> tuple[list[str], str]:
    """One clause for each thing, and the words for the background; without rng always the first paraphrase."""

    def pick(*choices: str) -> str:
        return choices[0] if rng is None else choices[int(rng.integers(len(choices)))]

    clauses = []
    for thing in scene.things:
        verbs = _VERBS.get(thing.motion) or (f"moves {thing.motion}", f"slides {thing.motion}")
        clauses.append(f"{pick('a', 'the', 'one')} {thing.words} {pick(*verbs)}")
    return clauses, pick(f"on a {scene.background} background", f"over a {scene.background} background")


def sentence(clauses: list[str], place: str) -> str:
    return f"{' and '.join(clauses)} {place}"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The sentence for a scene; without rng always its first paraphrase."""
    return sentence(*phrases(scene, rng))


def _distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32], radius: NDArray[np.float32]) -> NDArray:
    """Signed distance in pixels to the outline of a shape with the area of a circle of `radius`, y down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - radius * (math.sqrt(math.pi) / 2)
    if shape == "cross":
        arm = radius * math.sqrt(math.pi / 20)  # half the width of a bar three widths long: area 20 arm^2
        bar = np.maximum(abs(x) - 3 * arm, abs(y) - arm)
        return np.minimum(bar, np.maximum(abs(y) - 3 * arm, abs(x) - arm))
    if shape == "triangle":
        inner = radius * math.sqrt(math.pi / (3 * math.sqrt(3)))
        return np.maximum(y, abs(x) * (math.sqrt(3) / 2) - y / 2) - inner
    # A star of five tips, its inner radius half of the outer: fold the plane into one half tip.
    fifth = 2 * math.pi / 5
    outer = radius * math.sqrt(math.pi / (5 * math.sin(fifth / 2) * 0.5))
    angle = abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    u, v = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    dx, dy = 0.5 * math.cos(fifth / 2) - 1, 0.5 * math.sin(fifth / 2)  # from tip to inner corner
    return ((u - outer) * dy - v * dx) / math.hypot(dx, dy)


_REACH = {"circle": 1.0, "square": 0.9, "triangle": 1.6, "star": 1.47, "cross": 1.2}


def _path(thing: Thing, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray]:
    """Centre x, y and radius at every frame, the whole shape inside the picture all the time."""
    time = np.linspace(0, 1, FRAMES)
    radius = np.full(FRAMES, RADIUS[thing.size]) if thing.size else np.linspace(*GROWTH, FRAMES)
    offset = np.zeros((2, FRAMES))
    if thing.motion in DIRECTIONS:
        step = np.array(DIRECTIONS[thing.motion], dtype=float)
        offset = np.outer(step / np.hypot(*step) * rng.uniform(19, 24), time)
    elif thing.motion == "bounce":
        offset[1] = -HOP * abs(np.sin(2 * math.pi * time))
    reach = radius.max() * _REACH[thing.shape] + 1
    low, high = reach - offset.min(axis=1), EDGE - reach - offset.max(axis=1)
    middle, room = (low + high) / 2, np.maximum(high - low, 0) / 2
    start = middle + room * rng.uniform(-1, 1, size=2)
    x, y = start[:, None] + offset
    return x.astype(np.float32), y.astype(np.float32), radius.astype(np.float32)


def render(scene: Scene, rng: np.random.Generator) -> Clip | None:
    """Frames of a scene [T, H, W, 3]; two things never touch, and where there is no room for that it is None."""
    for _ in range(200):
        paths = [_path(thing, rng) for thing in scene.things]
        if len(paths) == 1 or _apart(scene, paths):
            break
    else:
        return None
    grid = np.arange(EDGE, dtype=np.float32) + 0.5
    frames = np.empty((FRAMES, EDGE, EDGE, 3), np.float32)
    frames[:] = BACKGROUNDS[scene.background]
    for thing, (cx, cy, radius) in zip(scene.things, paths, strict=True):
        x = grid[None, None, :] - cx[:, None, None]
        y = grid[None, :, None] - cy[:, None, None]
        x, y = np.broadcast_arrays(x, y)
        cover = np.clip(0.5 - _distance(thing.shape, x, y, radius[:, None, None]), 0, 1)[..., None]
        frames += cover * (np.array(COLOURS[thing.colour], np.float32) - frames)
    return np.rint(frames).astype(np.uint8)


def _apart(scene: Scene, paths: list) -> bool:
    (ax, ay, ar), (bx, by, br) = paths
    a, b = (_REACH[thing.shape] for thing in scene.things)
    return bool((np.hypot(ax - bx, ay - by) > ar * a + br * b).all())


def clip(seed: int, split: Split = "train", two_share: float = 0.25) -> tuple[Clip, str, Scene]:
    """Frames, caption and scene of one seed."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])
    things = 2 if rng.random() < two_share else 1
    frames = None
    while frames is None:
        scene = random_scene(rng, split, things)
        frames = render(scene, rng)
    return frames, caption(scene, rng), scene


def clips(seeds: range, split: Split = "train", two_share: float = 0.25) -> Iterator[tuple[Clip, str, Scene]]:
    return (clip(seed, split, two_share) for seed in seeds)
