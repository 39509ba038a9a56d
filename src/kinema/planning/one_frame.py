"""One-frame inference: which control images stand at which times, and where among them the picture is made.

Source: kohya-ss/musubi-tuner src/musubi_tuner/wan_generate_video.py, docs/wan_1f.md (Apache-2.0).
"""

from __future__ import annotations

import re

from kinema.errors import RequestError
from kinema.schema import CatalogEntry, Note, OneFramePlan, Request

HINT = "pass --one-frame target_index=1,control_index=0 and --control-image IMAGE"
LATEST = 1023
"""Latest time the rotary table of the official code has."""


def plan_one_frame(request: Request, entry: CatalogEntry, notes: list[Note]) -> OneFramePlan | None:
    """Return the times of the latent frames and which one is the picture; None where it was not asked for.

    Raises RequestError for what is no such text, and for times and images that do not pair.
    """
    if request.one_frame is None:
        for field in ("control_image", "control_mask"):
            if getattr(request, field):
                given = getattr(request, field)[0]
                raise _refuse(f"{field.replace('_', ' ')} {given} belongs to one-frame inference", HINT, field, given)
        return None
    for field in ("middle",) if entry.structure.get("num_clip_positions") else ("middle", "last"):
        if getattr(request, field):
            message = f"one-frame inference makes one picture: {field} {getattr(request, field)} is no frame of it"
            raise _refuse(message, "pass it as --control-image, with its time in control_index", field, field)
    target, controls = parse_one_frame(request.one_frame)
    images, masks = len(request.control_image), len(request.control_mask)
    if images != len(controls):
        given = ";".join(map(str, controls)) or "none"
        message = f"one_frame names {len(controls)} control times ({given}) for {images} control images"
        raise _refuse(message, "pass one --control-image for each control_index", "control_image", images)
    if masks > images:
        message = f"{masks} control masks for {images} control images"
        raise _refuse(message, "pass as many --control-mask as --control-image, or fewer", "control_mask", masks)
    if target in controls or len(set(controls)) < len(controls):
        message = f"one_frame {request.one_frame} names a time twice"
        raise _refuse(
            message, "give the target and each control image a time of its own", "one_frame", request.one_frame
        )
    notes.append(
        Note(
            about="one_frame",
            text=f"the picture is made at time {target} beside {images} control image(s); without a LoRA trained for "
            f"this, {entry.name} gives back nearly the control image",
        )
    )
    order = sorted([target, *controls])
    return OneFramePlan(
        positions=tuple(order), target=order.index(target), controls=tuple(order.index(time) for time in controls)
    )


def parse_one_frame(text: str) -> tuple[int, tuple[int, ...]]:
    """Return (target time, control times) of "target_index=1,control_index=0;2"; the order of controls is kept."""
    found: dict[str, tuple[int, ...]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, values = (word.strip() for word in part.partition("="))
        if name not in ("target_index", "control_index") or name in found:
            raise _refuse(
                f"one_frame {text!r}: {part!r} is not target_index or control_index, each once", HINT, "one_frame", text
            )
        if not re.fullmatch(r"\d+(\s*;\s*\d+)*", values) or (name == "target_index" and ";" in values):
            takes = "one number" if name == "target_index" else "numbers, with ; between"
            raise _refuse(f"one_frame {text!r}: {name} takes {takes}", HINT, "one_frame", text)
        found[name] = tuple(int(value) for value in values.split(";"))
        if max(found[name]) > LATEST:
            raise _refuse(f"one_frame {text!r}: times go from 0 to {LATEST}", HINT, "one_frame", text)
    if len(found) < 2:
        raise _refuse(f"one_frame {text!r} needs target_index and control_index", HINT, "one_frame", text)
    return found["target_index"][0], found["control_index"]


def _refuse(message: str, hint: str, field: str, got: object) -> RequestError:
    return RequestError(message, hint, field=field, got=got if isinstance(got, int) else str(got))
