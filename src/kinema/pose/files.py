"""Where the two networks that read poses lie on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kinema.errors import CatalogError
from kinema.pose.reader import PoseReader

SOURCE = "the folder process_checkpoint of the repository Wan-AI/Wan2.2-Animate-14B"

DETECTORS = ("detection/yolov10m.onnx", "det/yolov10m.onnx", "process_checkpoint/det/yolov10m.onnx")
POINTS = (
    "detection/vitpose_h_wholebody_model.onnx",
    "detection/vitpose_h_wholebody.onnx",
    "pose2d/vitpose_h_wholebody.onnx",
    "process_checkpoint/pose2d/vitpose_h_wholebody.onnx",
)
REPOSITORIES = ("", "Wan2.2-Animate-14B", "Wan-AI/Wan2.2-Animate-14B")
"""Places under a models folder: ComfyUI's `detection`, and the official repository's."""


def find_reader(detector: Path | None, points: Path | None, device: str, models: Iterable[Path]) -> PoseReader:
    """Return the reader of poses, of the ONNX files given, or else found under the models folders.

    Raises CatalogError where one is not there, and what PoseReader raises.
    """
    roots = [root / repository for root in models for repository in REPOSITORIES]
    files = []
    for what, given, names in (("detector", detector, DETECTORS), ("points", points, POINTS)):
        places = [given] if given else [root / name for root in roots for name in names]
        file = next((place for place in places if place.exists()), None)
        if file is None:
            searched = str(given) if given else ", ".join(map(str, roots[:: len(REPOSITORIES)])) or "no models folder"
            raise CatalogError(
                f"poses are read with {names[0].split('/')[-1]}, which is not in {searched}",
                f"fetch {SOURCE} and pass --{what} FILE, or put the file in a models folder as {names[0]}",
                name=names[0],
            )
        files.append(file)
    return PoseReader(files[0], files[1], device)
