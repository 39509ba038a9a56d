"""The camera embedding against that of VideoX-Fun, and the moves against points projected through them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_weights import assert_golden, golden
from kinema.errors import RequestError
from kinema.media.camera import Poses, Rays, camera_poses, pose_facts, read_poses
from kinema.planning.camera import is_pose_file, parse_moves, plan_camera
from kinema.schema import CameraPlan

FRAMES, WIDTH, HEIGHT = 81, 832, 480


def pose_file(path: Path, rows: list[list[float]]) -> Path:
    path.write_text("a header\n" + "".join(" ".join(map(str, row)) + "\n" for row in rows))
    return path


def moved(text: str, frames: int = FRAMES, fps: float = 16) -> Poses:
    return camera_poses(CameraPlan(segments=parse_moves(text, frames, fps)))


def plucker(poses: Poses, width: int, height: int) -> Tensor:
    return Rays.of(poses, width, height).of_frames(range(len(poses.intrinsics_F4)))


def seen(poses: Poses, *points: tuple[float, float, float]) -> Tensor:
    """Where points of the world are in the picture: [F, points, (u, v)], in shares of its sides."""
    world_4P = torch.tensor([[*point, 1.0] for point in points], dtype=torch.float64).T
    x, y, z = (poses.world_to_camera_F44 @ world_4P)[:, :3].unbind(1)
    fx, fy, cx, cy = poses.intrinsics_F4.T[:, :, None]
    return torch.stack([fx * x / z + cx, fy * y / z + cy], dim=-1)


def test_golden(tmp_path: Path) -> None:
    spec, want = golden("camera_plucker")
    poses = read_poses(pose_file(tmp_path / "poses.txt", spec["inputs"]["pose_rows"]))
    rays = Rays.of(poses, spec["config"]["width"], spec["config"]["height"])
    whole = rays.of_frames(range(len(poses.intrinsics_F4)))
    assert_golden(whole, want["plucker"])
    assert_golden(torch.stack(list(rays), dim=2), want["adapter_input"])
    assert torch.equal(rays.of_frames(range(5, 9)), whole[5:9]), "a part of a video has the video's origin"


AHEAD = (0.0, 0.0, 5.0)


@pytest.mark.parametrize(
    ("move", "axis", "sign"),
    [
        ("pan left", 0, +1), ("pan right", 0, -1), ("pan up", 1, +1), ("pan down", 1, -1),
        ("turn left", 0, +1), ("turn right", 0, -1), ("tilt up", 1, +1), ("tilt down", 1, -1),
    ],
)  # fmt: skip
def test_what_is_ahead_leaves_the_other_way(move: str, axis: int, sign: int) -> None:
    """A camera that goes left sees things go right; v counts downwards."""
    uv = seen(moved(move, 21), AHEAD)[:, 0]
    steps = uv.diff(dim=0)
    assert (steps[:, axis] * sign > 1e-4).all()
    assert steps[:, 1 - axis].abs().max() < 1e-9
    assert torch.equal(uv[0], torch.tensor([0.5, 0.5], dtype=torch.float64)), "frame 0 is where it starts"


@pytest.mark.parametrize(("move", "sign"), [("dolly in", 1), ("zoom in", 1), ("dolly out", -1), ("zoom out", -1)])
def test_things_grow_towards_the_camera(move: str, sign: int) -> None:
    uv = seen(moved(move, 21), (-1.0, 0.5, 5.0), (1.0, 0.5, 5.0))
    spread = (uv[:, 1, 0] - uv[:, 0, 0]).diff()
    assert (spread * sign > 1e-4).all()


@pytest.mark.parametrize(("move", "sign"), [("roll", -1), ("roll clockwise", -1), ("roll ccw", 1)])
def test_the_world_rolls_against_the_camera(move: str, sign: int) -> None:
    """What is to the right goes up (v falls) when the camera turns clockwise."""
    uv = seen(moved(move, 21), (1.0, 0.0, 5.0))[:, 0]
    assert (uv[:, 1].diff() * sign > 1e-4).all()


def test_a_wrong_way_would_be_caught() -> None:
    left, right = seen(moved("pan left"), AHEAD), seen(moved("pan right"), AHEAD)
    assert left[-1, 0, 0] > 0.5 > right[-1, 0, 0]
    assert torch.allclose(left + right, torch.ones_like(left)), "moves of equal speed mirror each other"


def test_presets_are_those_published() -> None:
    """1.5 over 81 frames, twice that for zoom, 60 degrees for roll; a pan keeps its direction and grows its moment."""
    translation = moved("pan left").world_to_camera_F44[:, :3, 3]
    assert torch.allclose(translation[:, 0], torch.arange(81, dtype=torch.float64) / 54)
    assert moved("zoom in").world_to_camera_F44[54, 2, 3].item() == pytest.approx(-2)
    assert moved("roll ccw").world_to_camera_F44[-1, 1, 0].item() == pytest.approx(math.sin(80 / 81 * math.pi / 3))
    rays = plucker(moved("pan left", 21), 64, 48)
    assert torch.equal(rays[0, ..., 3:], rays[-1, ..., 3:]) and (rays[0, ..., :3] == 0).all()
    moments = rays[:, 24, 32, :3].norm(dim=-1)
    assert (moments.diff() > 0).all()


def test_speed_angle_and_time() -> None:
    double, plain = moved("pan left 2").world_to_camera_F44, moved("pan left").world_to_camera_F44
    assert torch.allclose(double[:, 0, 3], 2 * plain[:, 0, 3])
    rolled = moved("roll 10deg").world_to_camera_F44[-1]
    assert math.degrees(math.acos(rolled[0, 0].item())) == pytest.approx(10)
    later = moved("static 20f; pan right")
    x = -later.world_to_camera_F44[:, 0, 3]
    assert (x[:20] == 0).all() and x[20].item() == pytest.approx(1 / 54) and x[80].item() == pytest.approx(61 / 54)
    assert moved("static 1s; pan right", fps=20).world_to_camera_F44.equal(later.world_to_camera_F44)
    thirds = parse_moves("pan left; pan up; static", 80, 16)
    assert [part.frames for part in thirds] == [26, 27, 27]


def test_moves_go_together_in_the_cameras_own_axes() -> None:
    both = moved("pan left, pan up 0.5", 21).world_to_camera_F44[-1, :3, 3]
    assert both.tolist() == pytest.approx([20 / 54, 10 / 54, 0])
    turned = torch.linalg.inv(moved("turn right 90deg 10f; dolly in", 20).world_to_camera_F44)[-1, :3, 3]
    assert turned.tolist() == pytest.approx([10 / 54, 0, 0], abs=1e-9), "it dollies to where it looks"


def test_a_file_of_the_same_motion_gives_the_same_embedding(tmp_path: Path) -> None:
    poses = moved("pan left, roll 20deg", 9)
    rows = [
        [0.0, *intrinsics.tolist(), 0, 0, *pose[:3].flatten().tolist()]
        for intrinsics, pose in zip(poses.intrinsics_F4, poses.world_to_camera_F44, strict=True)
    ]
    path = pose_file(tmp_path / "p.txt", rows)
    facts = pose_facts(path)
    assert (facts.kind, facts.frames) == ("camera", 9)
    plan = plan_camera(str(path), facts, 9, 16, [])
    assert torch.allclose(plucker(camera_poses(plan), 64, 48), plucker(poses, 64, 48))
    notes: list = []
    assert len(camera_poses(plan_camera(str(path), facts, 5, 16, notes)).intrinsics_F4) == 5
    assert "first 5" in notes[0].text
    with pytest.raises(RequestError, match="9 poses; the video has 13 frames"):
        plan_camera(str(path), facts, 13, 16, [])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pan lef", "'pan left'"),
        ("dally in", "'dolly in'"),
        ("pan", "pan left, pan right"),
        ("", "there is static, pan"),
        ("orbit", "tilt, turn, roll"),
        ("pan left up", "there is pan left"),
        ("dolly in 10deg", "tilt, turn and roll"),
        ("pan left 100f", "last 100 frames, the video 81"),
        ("pan left 20f", "last 20 frames"),
        ("pan left 81f; pan up", "last 81 frames"),
        ("pan left 2.5f", "whole number"),
        ("pan left 10f, pan up 20f", "go together"),
        ("pan left -1", "there is pan left"),
        ("static 20; pan right 61", "a length is 20f"),
        ("pan right 61", "a length is 20f"),
    ],
)
def test_what_is_no_move_is_refused_with_the_nearest(text: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_moves(text, 81, 16)
    assert words in str(caught.value) and caught.value.details["field"] == "camera"


GOOD = [0, 0.5, 0.9, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no pose"),
        ([GOOD, GOOD[:18]], "line 3 has 18 numbers"),
        ([[*GOOD[:18], "x"]], "line 2 is not all numbers"),
        ([[0, 0.0, *GOOD[2:]]], "focal length"),
        ([[*GOOD[:7], 2, *GOOD[8:]]], "no rotation"),
        ([[*GOOD[:7], -1, *GOOD[8:]]], "no rotation"),
        ([[*GOOD[:10], "nan", *GOOD[11:]]], "not finite"),
    ],
)
def test_a_bad_pose_file_is_refused_by_its_line(rows: list, words: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=words):
        read_poses(pose_file(tmp_path / "bad.txt", rows))


def test_words_are_told_from_files() -> None:
    assert all(map(is_pose_file, ["a.txt", "poses/left", "C:\\poses", "a b.CSV"]))
    assert not any(map(is_pose_file, ["pan left", "dolly in 0.5, roll 10deg", "static 20f; pan right"]))
