"""Size and length: what was asked, what the inputs suggest, the model's default, or a refusal with the nearest."""

from __future__ import annotations

from kinema.errors import RequestError
from kinema.planning.activations import SMALLEST_TILE
from kinema.planning.geometry import (
    PATCH,
    SPATIAL_STRIDE,
    SPEECH_MULTIPLE,
    nearest_frames,
    nearest_multiples,
    size_by_area,
    size_by_area_speech,
    size_by_area_wan22,
)
from kinema.planning.inputs import length_of_inputs
from kinema.schema import AREAS, CatalogEntry, Facts, Note, Request

ASPECT_ROLES = {
    "wan": ("control_image", "first", "last", "middle", "video", "control"),
    "flux": ("first", "control", "reference"),
}
"""Inputs whose aspect the video takes where no size is asked for, best first."""


def plan_size(request: Request, entry: CatalogEntry, facts: Facts, notes: list[Note]) -> tuple[int, int]:
    multiple = SPATIAL_STRIDE[entry.vae] * PATCH
    by_area = size_by_area_wan22 if entry.vae == "wan2.2" else size_by_area
    roles = ASPECT_ROLES[entry.family]
    image = next((media for role in roles for media in facts.media.get(role, ())), None)
    if entry.structure.get("speech"):
        multiple, by_area = SPEECH_MULTIPLE, size_by_area_speech
        image = next(iter(facts.media.get("reference", ())), None)
    if request.size and request.size not in AREAS:
        width, height = asked_size(request.size, multiple)
    elif request.size or (image and entry.by_area):
        area = AREAS[request.size] if request.size else entry.size[0] * entry.size[1]
        width, height = by_area(*(image.width, image.height) if image else (16, 9), area)
        if image and image.kind == "video" and _is_a_size(image.width, image.height, multiple, area):
            # A source that could be a result keeps its pixels: nothing is scaled or cropped.
            width, height = image.width, image.height
        aspect = f"the aspect of {image.path.name} ({image.width}x{image.height})" if image else "16:9"
        asked = request.size or f"{entry.size[0]}x{entry.size[1]}"
        notes.append(Note(about="size", text=f"{width}x{height}: {asked} as area, at {aspect}"))
    else:
        width, height = entry.size
    trained = entry.sizes + (entry.image_sizes if request.frames == 1 else ())
    if trained and (width, height) not in trained and not (image and entry.by_area and not request.size):
        known = ", ".join(f"{w}x{h}" for w, h in trained)
        notes.append(Note(about="size", text=f"{width}x{height} is not a size {entry.name} was made for ({known})"))
    return width, height


def _is_a_size(width: int, height: int, multiple: int, area: int) -> bool:
    return not (width % multiple or height % multiple) and area < 2 * width * height <= 2 * area


def asked_size(size: str, multiple: int) -> tuple[int, int]:
    """Return (width, height) of "832x480"; RequestError where a side is no multiple."""
    width, height = (int(side) for side in size.split("x"))
    if width % multiple or height % multiple:
        near = f"{nearest_multiples(width, multiple)[0]}x{nearest_multiples(height, multiple)[0]}"
        raise RequestError(
            f"size {width}x{height} does not divide: both sides must be multiples of {multiple}; nearest is {near}",
            f"pass --size {near}",
            field="size",
            got=f"{width}x{height}",
            allowed=f"multiples of {multiple}",
            nearest=near,
        )
    return width, height


def plan_length(request: Request, entry: CatalogEntry, facts: Facts, notes: list[Note]) -> tuple[int, float]:
    fps = request.fps or entry.fps
    if request.one_frame:
        return _one(request), fps
    if request.fps and request.fps != entry.fps:
        notes.append(
            Note(about="fps", text=f"plays at {request.fps:g} fps; {entry.name} moves as at {entry.fps:g} fps")
        )
    if request.seconds is not None:
        frames = nearest_frames(request.seconds * fps + 1)[0]
        notes.append(Note(about="frames", text=f"{request.seconds:g} s at {fps:g} fps is {frames} frames (4n+1)"))
    else:
        frames = request.frames or length_of_inputs(request, entry, facts, fps, notes)
    if (frames - 1) % 4:
        near = nearest_frames(frames)
        raise RequestError(
            f"frames {frames} is not 4n+1; nearest are {' and '.join(map(str, sorted(near)))}",
            f"pass --frames {near[0]}",
            field="frames",
            got=frames,
            allowed="4n+1",
            nearest=near[0],
        )
    if (request.first or request.last or request.middle) and frames == 1 and entry.family == "wan":
        raise RequestError(
            "frames 1 leaves nothing to make beside the given image; at least 5 are needed",
            f"pass --frames {entry.frames}",
            field="frames",
            got=frames,
            nearest=5,
        )
    return frames, fps


def _one(request: Request) -> int:
    if request.frames not in (None, 1) or request.seconds is not None:
        length = f"frames {request.frames}" if request.frames else f"seconds {request.seconds}"
        raise RequestError(
            f"{length}: one-frame inference makes one picture",
            "leave out --frames and --seconds",
            field="frames",
            got=request.frames,
            nearest=1,
        )
    return 1


def plan_tile(request: Request, stride: int) -> int | None:
    multiple, smallest = 2 * stride, SMALLEST_TILE * stride
    if request.tile and (request.tile % multiple or request.tile < smallest):
        near = max(smallest, nearest_multiples(request.tile, multiple)[0])
        raise RequestError(
            f"tile {request.tile} is not a multiple of {multiple} from {smallest} up; nearest is {near}",
            f"pass --tile {near}",
            field="tile",
            got=request.tile,
            nearest=near,
        )
    return request.tile
