"""Where the networks that look at driving videos lie on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kinema.errors import CatalogError
from kinema.pose.outline import OutlineReader
from kinema.pose.reader import PoseReader

DETECTORS = ("detection/yolov10m.onnx", "det/yolov10m.onnx", "process_checkpoint/det/yolov10m.onnx")
POINTS = (
    "detection/vitpose_h_wholebody_model.onnx",
    "detection/vitpose_h_wholebody.onnx",
    "pose2d/vitpose_h_wholebody.onnx",
    "process_checkpoint/pose2d/vitpose_h_wholebody.onnx",
)
REPOSITORIES = ("", "Wan2.2-Animate-14B", "Wan-AI/Wan2.2-Animate-14B")
"""Places under a models folder: ComfyUI's `detection`, and the official repository's."""

SAM2_SOURCE = "vietanhdev/segment-anything-2-onnx-models"
SAM2 = tuple(
    f"{folder}/sam2_hiera_{size}.encoder.onnx"
    for folder in ("sam2", SAM2_SOURCE)
    for size in ("large", "base_plus", "small", "tiny")
)


def find_reader(detector: Path | None, points: Path | None, device: str, models: Iterable[Path]) -> PoseReader:
    """Return the reader of poses, of the ONNX files given, or else found under the models folders.

    Raises CatalogError where one is not there, and what PoseReader raises.
    """
    models = tuple(models)
    roots = [root / repository for root in models for repository in REPOSITORIES]
    files = []
    for what, given, names in (("detector", detector, DETECTORS), ("points", points, POINTS)):
        file = _found(given, roots, names)
        if file is None:
            searched = str(given) if given else ", ".join(map(str, models)) or "no models folder"
            name = Path(names[-1]).name
            raise CatalogError(
                f"poses are read with {name}, which is not in {searched}",
                f"type: kinema models pull {name}; or pass --{what} FILE",
                name=name,
            )
        files.append(file)
    return PoseReader(files[0], files[1], device)


def find_outline(encoder: Path | None, device: str, models: Iterable[Path]) -> OutlineReader | None:
    """Return the reader of outlines, of SAM 2's encoder given or found, and the decoder beside it; None where none is.

    Raises CatalogError for one that was given and is not there, or lacks its decoder, and what OutlineReader raises.
    """
    found = _found(encoder, models, SAM2)
    if found is None and encoder is None:
        return None
    if found is None or "encoder" not in found.name:
        raise CatalogError(
            f"{encoder} is no encoder of SAM 2" if found else f"{encoder}: no such file",
            "pass --sam2 sam2_hiera_large.encoder.onnx, having typed: kinema models pull sam2_hiera_large.encoder.onnx",
            name=str(encoder),
        )
    decoder = found.with_name(found.name.replace("encoder", "decoder"))
    if not decoder.exists():
        raise CatalogError(
            f"SAM 2 has two files, and beside {found} there is no {decoder.name}",
            f"type: kinema models pull {decoder.name}; both belong in one folder",
            name=decoder.name,
        )
    return OutlineReader(found, decoder, device)


def _found(given: Path | None, roots: Iterable[Path], names: Sequence[str]) -> Path | None:
    places = [given] if given else [root / name for root in roots for name in names]
    return next((place for place in places if place.exists()), None)
