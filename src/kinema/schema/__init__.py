"""The nouns without tensors: what is asked (Request), what was found out (facts), what will be done (Plan).

Everything here is frozen, JSON in and JSON out, and knows nothing of torch. The command line, the
JSON Schema, HTTP bodies and the reference page are all generated from `Request`.
"""

from __future__ import annotations

from kinema.lora import CatalogLora, LoraPlan
from kinema.schema.events import Event, Preview, Progress, Result, StageReport
from kinema.schema.facts import (
    COMPONENTS,
    CatalogEntry,
    Facts,
    FileFacts,
    Machine,
    MediaFacts,
    Note,
    calibration_key,
)
from kinema.schema.plan import (
    AnimatePlan,
    CameraPlan,
    CameraSegment,
    ClipPlan,
    FluxPlan,
    ImagePlan,
    Limits,
    ModelRef,
    MotionPlan,
    OneFramePlan,
    OutputPlan,
    Plan,
    PlanStep,
    SoundPlan,
    SpeechPlan,
    StageCost,
    VideoPlan,
)
from kinema.schema.request import Request, flag, parse_bytes
from kinema.schema.settings import Hub, Settings
from kinema.schema.words import (
    AREAS,
    Component,
    Dtype,
    Expert,
    Frozen,
    OutputKind,
    Precision,
    Quantise,
    Solver,
)

__all__ = [
    "AREAS",
    "COMPONENTS",
    "AnimatePlan",
    "CameraPlan",
    "CameraSegment",
    "CatalogEntry",
    "CatalogLora",
    "ClipPlan",
    "Component",
    "Dtype",
    "Event",
    "Expert",
    "Facts",
    "FileFacts",
    "FluxPlan",
    "Frozen",
    "Hub",
    "ImagePlan",
    "Limits",
    "LoraPlan",
    "Machine",
    "MediaFacts",
    "ModelRef",
    "MotionPlan",
    "Note",
    "OneFramePlan",
    "OutputKind",
    "OutputPlan",
    "Plan",
    "PlanStep",
    "Precision",
    "Preview",
    "Progress",
    "Quantise",
    "Request",
    "Result",
    "Settings",
    "Solver",
    "SoundPlan",
    "SpeechPlan",
    "StageCost",
    "StageReport",
    "VideoPlan",
    "calibration_key",
    "flag",
    "parse_bytes",
]
