"""How a run that cannot go on ends: what was wrong, what is kept, what to type."""

from __future__ import annotations

from typing import Any

import torch

from kinema.errors import KinemaError, MachineError, NumericsError, OutputError
from kinema.ops import LastCall
from kinema.planning import memory
from kinema.runtime.finite import first_nonfinite
from kinema.schema import Machine, Plan

KEPT = {"latents": "decode", "steps": "resume", "clips": "resume"}
"""Detail of an error that says where finished work lies -> the verb that goes on with it."""


def hinted(error: Exception, hint: str, **details: Any) -> KinemaError:
    """Return the same error with one hint more. Foreign errors become ours."""
    if isinstance(error, KinemaError):
        return type(error)(error.message, f"{error.hint}\n{hint}".strip(), **{**error.details, **details})
    return OutputError(f"the video could not be made: {error}", hint, **details)


def out_of_memory(plan: Plan, stage: str, machine: Machine, said: str, details: dict[str, Any]) -> MachineError:
    """Return the error of a run whose memory ran out in `stage`: what would fit, and what is kept.

    machine   as it is once everything is dropped.
    details   of the error that ended it.
    """
    fits = memory.smaller(plan, stage, machine)
    hints = ["pass " + ", or ".join(fits)] if fits else ["take a smaller model, or another machine"]
    kept = [f"what is done is kept: kinema {verb} {details[name]}" for name, verb in KEPT.items() if name in details]
    first = next(iter(said.splitlines()), "the system gave no reason")
    return MachineError(
        f"memory ran out in the stage {stage}: {first[:200]}",
        "; ".join(hints + kept[:1]),
        **{**details, "stage": stage, "have": machine.memory_free, "fits": fits},
    )


def located(error: NumericsError, last: LastCall | None) -> NumericsError:
    """Return the same error, naming the first layer whose output is not finite, if the last forward shows it."""
    if last is None:
        return error
    timesteps = torch.full((last.x_BCFhw.shape[0],), last.timestep, device=last.x_BCFhw.device)
    layers = (first_nonfinite(last.model, last.x_BCFhw, timesteps, context) for context in last.contexts)
    layer = next((layer for layer in layers if layer is not None), None)
    if layer is None:
        return error
    return NumericsError(
        f"{error.message}; it begins in layer {layer}", error.hint, **{**error.details, "layer": layer}
    )
