"""Which task a plan of clips is. A new one is a row: the field of Plan that says what drives it, and how it is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from kinema.clips.animate import animate_clips
from kinema.clips.loop import ClipTask, Models
from kinema.clips.speech import speech_clips
from kinema.sampling.denoiser import Branch
from kinema.schema import Plan

MakeTask = Callable[[Plan, Models, Mapping[Branch, Tensor], Callable[[], None]], ClipTask]
"""make(plan, models, texts, stop): `models` loads, `texts` are rows by branch, empty where every clip is sampled
already and only decoded; `stop` is called now and then, and may raise."""

TASKS: dict[str, MakeTask] = {"speech": speech_clips, "animate": animate_clips}


def clip_task(plan: Plan, models: Models, texts: Mapping[Branch, Tensor], stop: Callable[[], None]) -> ClipTask:
    """Return the task of a plan, with all encoded that is constant over its clips."""
    make = next(make for field, make in TASKS.items() if getattr(plan, field) is not None)
    return make(plan, models, texts, stop)
