"""Two people in a neutral pose, by FLUX.1-Kontext: pictures in which the lengths of their limbs can be measured.

Owns which sentence is said of which picture; the engine plans and runs them like any other request.
Source of the order and the numbers: Wan-Video/Wan2.2 wan/modules/animate/preprocess/process_pipepline.py (Apache-2.0).
The sentences are ours.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from pathlib import Path

from torch import Tensor

from kinema.engine import Engine
from kinema.errors import RequestError
from kinema.media.image import image_facts
from kinema.media.video import write
from kinema.pose.keypoints import Pose
from kinema.request import make_request
from kinema.schema import MediaFacts, Note, Plan, Progress, Request, Settings
from kinema.tensors import Media

EDITING = ("precision", "quantise", "seed", "vram", "ram")
"""Fields of the request that mean something to the edits alone."""

INHERITED = (*EDITING, "device", "overwrite")
"""Those that the edits have."""

STEPS = 28
SEEN = 0.75
ARMS, LEGS = (3, 4, 6, 7), (9, 10, 12, 13)
"""Elbows and wrists, knees and ankles."""


class NeutralPoses:
    """The edits of one run: of a frame of the driver, driver.png, and of the reference image.

    Planned when made, before a frame is read: raises what planning raises, and RequestError for a model that makes
    something else than an edit of a picture.
    """

    def __init__(self, model: str, request: Request, settings: Settings, folder: Path, size: tuple[int, int]) -> None:
        self._model, self._request, self._folder, self._engine = model, request, folder, Engine(settings)
        width, height = size
        self._driver = MediaFacts(path=folder / "driver.png", kind="image", width=width, height=height)
        self._reference = image_facts(request.reference[0])
        self._plans(())

    def __call__(
        self, frame_HWC: Tensor, poses: Iterable[Pose | None]
    ) -> Generator[Progress | Note, None, tuple[Path, Path]]:
        """Make both pictures and return where they are, driver first; `poses` say how much of the body is needed."""
        height, width = frame_HWC.shape[:2]
        plans = self._plans(poses)
        write(Media(iter([frame_HWC[None]]), 1, width, height, 1, {}), self._driver.path, "png")
        with self._engine as engine:
            for plan in plans:
                yield from (event for event in engine.run(plan) if isinstance(event, Progress | Note))
        driver, reference = (plan.output.paths[0][0] for plan in plans)
        return driver, reference

    def _plans(self, poses: Iterable[Pose | None]) -> list[Plan]:
        poses = tuple(poses)
        return [
            self._plan(picture, self._folder / f"{role}-neutral.png", sentence(poses, picture.width, picture.height))
            for role, picture in (("driver", self._driver), ("reference", self._reference))
        ]

    def _plan(self, picture: MediaFacts, save: Path, prompt: str) -> Plan:
        fields = {name: value for name in INHERITED if (value := getattr(self._request, name)) is not None}
        edit = {"model": self._model, "prompt": prompt, "reference": picture.path, "save": save, "steps": STEPS}
        plan = self._engine.plan(make_request({**fields, **edit}), promised={picture.path: picture})
        if plan.flux is None or plan.flux.redux is not None:
            raise RequestError(
                f"neutral {self._model} edits no pictures by a sentence",
                "pass --neutral flux.1-kontext-dev",
                field="neutral",
                got=self._model,
            )
        return plan


def sentence(poses: Iterable[Pose | None], width: int, height: int) -> str:
    """Return what is asked of a picture of this shape, for as much of the body as any of the poses shows."""
    people = [pose for pose in poses if pose is not None]
    arms, legs = (any(_shows(pose, part) for pose in people) for part in (ARMS, LEGS))
    if not arms and not legs:
        return "Turn the person to face the camera."
    stretched = "stretched out to the sides, in a T-pose" if width > height else "straight down at the sides"
    whole = "stands upright, with hands and feet in the picture" if legs else "shows both hands"
    return f"Change the pose of the person: facing the camera, both arms {stretched}. The person {whole}."


def _shows(pose: Pose, part: tuple[int, ...]) -> bool:
    points = pose.body[list(part)]
    return bool(((points[:, 2] >= SEEN) & (points[:, :2] <= (pose.width, pose.height)).all(1)).any())
