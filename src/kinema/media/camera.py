"""Where the camera is in each frame, and that as the Pluecker embedding Fun-Camera models take.

Owns pose files, the integration of moves and the embedding. Coordinates: x to the right, y down, z where the camera
looks; a pose maps world to camera. Which move means what is planning/camera.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kinema.errors import RequestError
from kinema.schema import CameraPlan, CameraSegment, MediaFacts

FOCAL = (0.532139961, 0.946026558)
"""fx and fy of the published presets, as shares of width and height: 86.4 degrees wide at 16:9."""

POSE_ASPECT = 1280 / 720
"""Width over height of the pictures that stored focal lengths are shares of."""

NUMBERS = 19


@dataclass(frozen=True)
class Poses:
    """Cameras of F frames, float64.

    intrinsics_F4           fx, fy, cx, cy as shares of the width, height, width and height.
    world_to_camera_F44     rigid motions.
    """

    intrinsics_F4: Tensor
    world_to_camera_F44: Tensor

    def __getitem__(self, frames: slice) -> Poses:
        return Poses(self.intrinsics_F4[frames], self.world_to_camera_F44[frames])


def camera_poses(plan: CameraPlan) -> Poses:
    """Return the pose of every frame of the plan: read from its file, or moved along its segments."""
    frames = sum(segment.frames for segment in plan.segments)
    if plan.path is not None:
        return read_poses(plan.path)[:frames]
    centre = torch.tensor([*FOCAL, 0.5, 0.5], dtype=torch.float64)
    return Poses(centre.expand(frames, 4), torch.linalg.inv(_moved(plan.segments)))


def _moved(segments: tuple[CameraSegment, ...]) -> Tensor:
    """[F, 4, 4] camera to world: frame 0 at the origin, each further frame one step of its segment on from there.

    Steps are in the camera's own axes, so that a dolly goes where the camera looks by then.
    """
    pose_44 = torch.eye(4, dtype=torch.float64)
    poses: list[Tensor] = []
    for segment in segments:
        step_44 = _rigid(segment.shift, segment.turn)
        for _ in range(segment.frames):
            pose_44 = pose_44 @ step_44 if poses else pose_44
            poses.append(pose_44)
    return torch.stack(poses)


def _rigid(shift: tuple[float, float, float], turn: tuple[float, float, float]) -> Tensor:
    """The motion [4, 4] of a shift and of a turn by a rotation vector, in radians."""
    x, y, z = turn
    motion_44 = torch.eye(4, dtype=torch.float64)
    motion_44[:3, :3] = torch.linalg.matrix_exp(
        torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]], dtype=torch.float64)
    )
    motion_44[:3, 3] = torch.tensor(shift, dtype=torch.float64)
    return motion_44


# --- pose files ----------------------------------------------------------------------------------


def pose_facts(path: Path) -> MediaFacts:
    """Return how many poses a file holds, as `frames`. Raises RequestError as read_poses does."""
    return MediaFacts(path=path, kind="camera", frames=len(read_poses(path).intrinsics_F4))


def read_poses(path: Path) -> Poses:
    """Return the poses of a RealEstate10K file: a header line, then 19 numbers a frame.

    The numbers: time, fx, fy, cx, cy (shares of width and height, of a 16:9 picture), 0, 0, and the 3 x 4 matrix from
    world to camera, row by row. Commas may separate them.
    Raises RequestError naming the line that is not so.
    Source: aigc-apps/VideoX-Fun videox_fun/data/utils.py (Apache-2.0).
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _no_poses(path, getattr(error, "strerror", None) or "it is no text") from error
    rows = [_row(path, number, line) for number, line in enumerate(lines[1:], 2) if line.strip()]
    if not rows:
        raise _no_poses(path, "it has no pose below its header line")
    table_FN = torch.tensor(rows, dtype=torch.float64)
    poses_F44 = torch.eye(4, dtype=torch.float64).repeat(len(rows), 1, 1)
    poses_F44[:, :3] = table_FN[:, 7:].view(-1, 3, 4)
    return Poses(table_FN[:, 1:5], poses_F44)


def _row(path: Path, number: int, line: str) -> list[float]:
    words = line.replace(",", " ").split()
    try:
        row = [float(word) for word in words]
    except ValueError as error:
        raise _no_poses(path, f"line {number} is not all numbers") from error
    if len(row) != NUMBERS:
        raise _no_poses(path, f"line {number} has {len(row)} numbers, not {NUMBERS}")
    if not all(map(math.isfinite, row)) or row[1] <= 0 or row[2] <= 0:
        raise _no_poses(path, f"line {number} has a focal length of 0 or less, or a number that is not finite")
    rotation = torch.tensor(row[7:], dtype=torch.float64).view(3, 4)[:, :3]
    if not torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-2) or rotation.det() < 0:
        raise _no_poses(
            path, f"line {number} holds no rotation: the columns of its 3 x 4 matrix are not at right angles"
        )
    return row


def _no_poses(path: Path, why: str) -> RequestError:
    return RequestError(
        f"{path} cannot be read as a pose file: {why}",
        "write a header line, then 19 numbers a frame: time fx fy cx cy 0 0 and the 3x4 world-to-camera matrix by rows",
        field="camera",
        got=str(path),
    )


# --- embedding -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rays:
    """The rays of every pixel of F frames, made when they are asked for: of a whole clip they are large.

    Iterating yields what the camera adapter reads, latent frame by latent frame: pluecker_BCHW [1, 24, height, width],
    the four frames behind it as channels, the first frame four times over; channel 4 * c + n is component c of the
    n-th of them.

    intrinsics_F4         fx, fy, cx, cy in pixels, float32.
    camera_to_world_F44   float32, in the camera of frame 0, where the world begins.

    Rays go through pixel centres; focal lengths are corrected where the picture is not 16:9.
    Source: aigc-apps/VideoX-Fun videox_fun/data/utils.py process_pose_params and
    videox_fun/pipeline/pipeline_wan_fun_control.py (Apache-2.0). Parity: tests/parity/test_camera.py.
    """

    intrinsics_F4: Tensor
    camera_to_world_F44: Tensor
    width: int
    height: int

    @classmethod
    def of(cls, poses: Poses, width: int, height: int) -> Rays:
        first_44, others_F44 = poses.world_to_camera_F44[0], torch.linalg.inv(poses.world_to_camera_F44)
        intrinsics_F4 = _in_pixels(poses.intrinsics_F4, width, height)
        return cls(intrinsics_F4.float(), (first_44 @ others_F44).float(), width, height)

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(-3, len(self.intrinsics_F4), 4):
            rays_FHWC = self.of_frames([max(frame, 0) for frame in range(start, start + 4)])
            yield rays_FHWC.permute(3, 0, 1, 2).reshape(1, 24, self.height, self.width)

    def of_frames(self, frames: Sequence[int]) -> Tensor:
        """Return rays_FHWC [frames, height, width, 6], float32: moment o x d, then direction d."""
        chosen, device = list(frames), self.intrinsics_F4.device
        fx, fy, cx, cy = self.intrinsics_F4[chosen].T[:, :, None, None]
        camera_to_world_F44 = self.camera_to_world_F44[chosen]
        v_H, u_W = (torch.arange(side, device=device) + 0.5 for side in (self.height, self.width))
        x_FHW, y_FHW = torch.broadcast_tensors((u_W[None, None] - cx) / fx, (v_H[None, :, None] - cy) / fy)
        d_FHWC = F.normalize(torch.stack([x_FHW, y_FHW, torch.ones_like(x_FHW)], dim=-1), dim=-1)
        d_FHWC = torch.einsum("fij,fhwj->fhwi", camera_to_world_F44[:, :3, :3], d_FHWC)
        o_FHWC = camera_to_world_F44[:, None, None, :3, 3].expand_as(d_FHWC)
        return torch.cat([torch.linalg.cross(o_FHWC, d_FHWC, dim=-1), d_FHWC], dim=-1)


def _in_pixels(intrinsics_F4: Tensor, width: int, height: int) -> Tensor:
    aspect = width / height
    # A stored focal length is a share of a 16:9 picture; the crop to another aspect keeps the other side whole.
    widen, heighten = (POSE_ASPECT / aspect, 1.0) if aspect < POSE_ASPECT else (1.0, aspect / POSE_ASPECT)
    return intrinsics_F4 * torch.tensor([width * widen, height * heighten, width, height], dtype=torch.float64)
