"""Video to video, and FLUX's picture to picture: sampling starts from a noised source, at the step its strength says.

Source of the rule: huggingface/diffusers pipelines/wan/pipeline_wan_video2video.py (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kinema.errors import RequestError
from kinema.schema import CatalogEntry, Note, PlanStep, Request

STRENGTH = 0.8


def starts_from_video(request: Request, entry: CatalogEntry) -> bool:
    """Whether the request's video (of FLUX: its picture) is what sampling starts from, not a part that is kept."""
    if entry.family == "flux":
        return request.first is not None and "mask" not in entry.takes
    drives = entry.structure.get("speech") or entry.structure.get("animate")
    return request.video is not None and "mask" not in entry.takes and not drives


def plan_strength(request: Request, entry: CatalogEntry, notes: list[Note]) -> float | None:
    """Return the share of steps that are run on a noised video; None where sampling starts from noise.

    Raises RequestError for a strength without a video to start from.
    """
    if starts_from_video(request, entry):
        if request.strength is None:
            notes.append(Note(about="strength", text=f"{STRENGTH:g}; a smaller one keeps more of the source"))
        return STRENGTH if request.strength is None else request.strength
    if request.strength is None:
        return None
    if entry.family == "flux":
        hint = "pass --first PICTURE as well" if "first" in entry.takes else "take flux.1-dev, with --first PICTURE"
        message = f"strength {request.strength:g} has no picture to start from"
    elif request.video is None:
        hint = (
            "pass --video VIDEO as well" if "video" in entry.takes else "take a text-to-video model, with --video VIDEO"
        )
        message = f"strength {request.strength:g} has no video to start from"
    else:
        hint = "leave out --strength, or take a text-to-video model"
        message = f"{entry.name} keeps the video it is given: strength {request.strength:g} means nothing to it"
    raise RequestError(message, hint, field="strength", got=request.strength)


def last_steps(steps: Sequence[PlanStep], strength: float, notes: list[Note]) -> list[PlanStep]:
    """Return the steps that are run: the last `strength` of them, rounded down.

    Raises RequestError where that is none.
    """
    count = int(len(steps) * strength + 1e-9)
    if not count:
        least = math.ceil(1000 / len(steps)) / 1000
        raise RequestError(
            f"strength {strength:g} of {len(steps)} steps leaves none to run",
            f"pass --strength {least:g} or more, or more --steps",
            field="strength",
            got=strength,
            nearest=least,
        )
    run = list(steps[-count:])
    text = f"the last {count} of {len(steps)} steps are run, from sigma {run[0].sigma:.4f} on"
    ignored = "; nothing of the source is left in noise of sigma 1" if run[0].sigma == 1 else ""
    notes.append(Note(about="strength", text=text + ignored))
    return run
