"""What a camera does over a video, from words: "pan left", "dolly in 0.5, roll 10deg", "static 1s; pan right".

Moves joined by "," happen together, those joined by ";" one after the other. Pure parsing and arithmetic; poses and
their embedding are media/camera.py's.
"""

from __future__ import annotations

import math
import re
from difflib import get_close_matches
from itertools import pairwise

from kinema.errors import RequestError
from kinema.planning.geometry import whole_frames
from kinema.schema import CameraPlan, CameraSegment, MediaFacts, Note

STEP = 1.5 / 81
TURN = math.pi / 3 / 81
"""Length and angle (radians) of one frame at speed 1: the presets' total over 81 frames.
Source: aigc-apps/VideoX-Fun comfyui/camera_utils.py (Apache-2.0): 1.5 and 60 degrees."""

FASTEST = 20
"""Speeds above it are lengths that lack their unit."""

Vector = tuple[float, float, float]

# Axes of the camera: x to the right, y down, z where it looks. What a move adds each frame: shift, rotation vector.
STILL: Vector = (0.0, 0.0, 0.0)
MOVES: dict[str, dict[str, tuple[Vector, Vector]]] = {
    "static": {"": (STILL, STILL)},
    "pan": {
        "left": ((-STEP, 0.0, 0.0), STILL),
        "right": ((STEP, 0.0, 0.0), STILL),
        "up": ((0.0, -STEP, 0.0), STILL),
        "down": ((0.0, STEP, 0.0), STILL),
    },
    "dolly": {"in": ((0.0, 0.0, STEP), STILL), "out": ((0.0, 0.0, -STEP), STILL)},
    "zoom": {"in": ((0.0, 0.0, 2 * STEP), STILL), "out": ((0.0, 0.0, -2 * STEP), STILL)},
    "tilt": {"up": (STILL, (TURN, 0.0, 0.0)), "down": (STILL, (-TURN, 0.0, 0.0))},
    "turn": {"left": (STILL, (0.0, -TURN, 0.0)), "right": (STILL, (0.0, TURN, 0.0))},
    "roll": {"clockwise": (STILL, (0.0, 0.0, TURN)), "anticlockwise": (STILL, (0.0, 0.0, -TURN))},
}
DEFAULT_DIRECTION = {"static": "", "roll": "clockwise"}
DIRECTION_WORDS = {"cw": "clockwise", "ccw": "anticlockwise", "counterclockwise": "anticlockwise"}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(deg|f|s|)")
POSE_SUFFIXES = (".txt", ".csv")
HINT = 'pass --camera "pan left", --camera "static 1s; dolly in 0.5, roll 10deg", or a pose file (.txt)'


def is_pose_file(text: str) -> bool:
    """Whether a camera field names a file: it ends in .txt or .csv, or has a folder in it."""
    return text.strip().lower().endswith(POSE_SUFFIXES) or "/" in text or "\\" in text


def plan_camera(
    text: str | None, pose_file: MediaFacts | None, frames: int, fps: float, notes: list[Note]
) -> CameraPlan | None:
    """Return what the camera does in each of `frames`; None where nothing was asked.

    pose_file   facts of the file that `text` names, its `frames` the poses in it; None where `text` is words.

    Raises RequestError for what is no move, lengths that do not add up to `frames`, and too few poses.
    """
    if text is None:
        return None
    if pose_file is None:
        return CameraPlan(segments=parse_moves(text, frames, fps))
    if pose_file.frames < frames:
        raise RequestError(
            f"camera {pose_file.path} has {pose_file.frames} poses; the video has {frames} frames",
            f"give a pose for each frame, or pass --frames {whole_frames(pose_file.frames)}",
            field="camera",
            got=pose_file.frames,
            allowed=frames,
        )
    if pose_file.frames > frames:
        text = f"of the {pose_file.frames} poses in {pose_file.path.name} the first {frames} are used"
        notes.append(Note(about="camera", text=text))
    return CameraPlan(path=pose_file.path, segments=(CameraSegment(frames=frames),))


def parse_moves(text: str, frames: int, fps: float) -> tuple[CameraSegment, ...]:
    """Return the segments of a text of moves, together exactly `frames` long.

    Segments without a length share what is left evenly. Frame 0 is where the camera starts; each further frame is one
    step of the segment it is in.
    """
    parts = [_Part(part, fps) for part in text.split(";")]
    open_ = [part for part in parts if part.frames is None]
    left = frames - sum(part.frames or 0 for part in parts)
    if left < len(open_) or (left and not open_):
        stated = frames - left
        raise RequestError(
            f"camera {text!r}: its moves last {stated} frames, the video {frames}",
            "leave one length out, which then takes the rest" if left <= 0 else f"add: ; static {left}f",
            field="camera",
            got=stated,
            allowed=frames,
        )
    bounds = [left * index // max(len(open_), 1) for index in range(len(open_) + 1)]
    shares = iter([after - before for before, after in pairwise(bounds)])
    lengths = [part.frames if part.frames is not None else next(shares) for part in parts]
    return tuple(
        part.segment(length, length - (index == 0))
        for index, (part, length) in enumerate(zip(parts, lengths, strict=True))
    )


class _Part:
    """One segment as written: its moves, and its length where one is given."""

    def __init__(self, text: str, fps: float) -> None:
        self.frames: int | None = None
        self.moves: list[tuple[Vector, Vector, float, float | None]] = []
        for move in text.split(","):
            name, direction, amounts = _words(move)
            speed, degrees = 1.0, None
            for number, unit in amounts:
                if unit in ("f", "s"):
                    self._last(move, round(number * fps) if unit == "s" else number)
                elif unit == "deg":
                    degrees = _angle(move, name, number)
                else:
                    speed = _speed(move, name, number)
            shift, turn = MOVES[name][direction]
            self.moves.append((shift, turn, speed, degrees))

    def _last(self, move: str, frames: float) -> None:
        if frames != int(frames) or frames < 1 or (self.frames is not None and self.frames != frames):
            raise _no_move(move, "its length is a whole number of frames, 1 at least, one for moves that go together")
        self.frames = int(frames)

    def segment(self, frames: int, steps: int) -> CameraSegment:
        shifts, turns = [], []
        for shift, turn, speed, degrees in self.moves:
            # An angle is that of the whole segment; a speed that of a frame.
            factor = speed if degrees is None else math.radians(degrees) / (TURN * max(steps, 1))
            shifts.append([factor * value for value in shift])
            turns.append([factor * value for value in turn])
        return CameraSegment(frames=frames, shift=_total(shifts), turn=_total(turns))


def _total(vectors: list[list[float]]) -> Vector:
    x, y, z = (sum(axis) for axis in zip(*vectors, strict=True))
    return (x, y, z)


def _words(move: str) -> tuple[str, str, list[tuple[float, str]]]:
    """The name, direction and amounts of one move."""
    words = move.casefold().split()
    amounts = [AMOUNT.fullmatch(word) for word in words]
    names = [word for word, amount in zip(words, amounts, strict=True) if amount is None]
    if not names or names[0] not in MOVES:
        raise _no_move(move, f"there is {', '.join(MOVES)}", *names[:1])
    name, directions = names[0], MOVES[names[0]]
    direction = DIRECTION_WORDS.get(names[1], names[1]) if len(names) > 1 else DEFAULT_DIRECTION.get(name)
    if direction not in directions or len(names) > 2:
        known = ", ".join(f"{name} {direction}".strip() for direction in directions)
        raise _no_move(move, f"there is {known}", *names)
    return name, direction, [(float(amount[1]), amount[2]) for amount in amounts if amount]


def _angle(move: str, name: str, degrees: float) -> float:
    if name not in ("tilt", "turn", "roll"):
        raise _no_move(move, "degrees are for tilt, turn and roll; a speed is a plain number, 1 the usual one")
    return degrees


def _speed(move: str, name: str, speed: float) -> float:
    if name == "static" or speed > FASTEST:
        raise _no_move(move, f"a plain number is a speed, 1 the usual one, {FASTEST} at most; a length is 20f or 1.5s")
    return speed


def _no_move(move: str, allowed: str, *words: str) -> RequestError:
    phrases = [f"{name} {direction}".strip() for name, directions in MOVES.items() for direction in directions]
    near = get_close_matches(" ".join(words), phrases, 1, 0.5) if words else []
    return RequestError(
        f"camera {move.strip()!r} is no move: {allowed}" + (f"; did you mean {near[0]!r}?" if near else ""),
        HINT,
        field="camera",
        got=move.strip(),
        allowed=phrases,
    )
