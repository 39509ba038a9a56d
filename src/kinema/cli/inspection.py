"""What a file is: weights of a model, latents, or an output of Kinema with its plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kinema.cli.plans import plan_text
from kinema.cli.tell import gigabytes
from kinema.errors import CheckpointError, RequestError
from kinema.planning.outputs import PLAN_KEY, parse_plan
from kinema.schema import FileFacts, Plan

if TYPE_CHECKING:
    from kinema.weights.convert import Converted

OUTPUT_SUFFIXES = (".mp4", ".webm", ".gif", ".webp", ".png")


def inspect_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Return what a file is, as text and as data.

    Raises CheckpointError for weights that are damaged or unknown, and for what no reader of ours can open.
    """
    from kinema.catalog import load_catalog, matching_entries
    from kinema.weights.detect import inspect

    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "check the path", path=str(path))
    if path.suffix.lower() in OUTPUT_SUFFIXES or (path.is_dir() and any(path.glob("frame_*.png"))):
        return _output(path)
    if path.suffix.lower() == ".safetensors" and (plan := embedded_plan(path)) is not None:
        size = f"{plan.frames} frames, {plan.width}x{plan.height}"
        return _with_plan(path, "latents", f"latents of {size}; make the video with: kinema decode {path}", plan)
    facts = inspect(path)
    fits = [entry.name for entry in matching_entries(facts.config, load_catalog())] if facts.component == "dit" else []
    data = {"path": str(path), "kind": "weights", **facts.model_dump(mode="json"), "models": fits}
    return _weights_text(facts, fits), data


def converted_text(made: Converted) -> tuple[str, dict[str, Any]]:
    """Return what was written and what that changed, as text and as data."""
    proof, facts = made.proof, made.facts
    changed = "every number as it was"
    if proof.error:
        changed = f"numbers changed by {proof.error:.2%}, at most {proof.worst:.2%} ({proof.worst_name})"
    held = facts.quantisation or facts.dtype
    text = f"{facts.path}\n  {held}, {facts.dialect} names, {gigabytes(facts.bytes)}; read back: {changed}"
    data = {"event": "result", "paths": [str(facts.path)], "error": proof.error, "worst": proof.worst}
    return text, {**data, "worst_name": proof.worst_name, "facts": facts.model_dump(mode="json")}


def embedded_plan(path: Path) -> Plan | None:
    """Return the plan that an output, a latents file or the .json beside one carries, None where it carries none.

    Raises CheckpointError for a plan of another version, and for a file that cannot be read.
    """
    try:
        text = _embedded_text(path)
    except (RequestError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", "give a file that Kinema wrote", path=str(path)
        ) from error
    return None if text is None else parse_plan(text, path)


def _embedded_text(path: Path) -> str | None:
    if path.suffix.lower() == ".json":
        return path.read_text("utf-8")
    if path.suffix.lower() == ".safetensors":
        from kinema.weights.files import open_tensors

        return open_tensors(path).metadata.get(PLAN_KEY)
    from kinema.media.metadata import read_metadata

    return read_metadata(path).get(PLAN_KEY)


def _output(path: Path) -> tuple[str, dict[str, Any]]:
    plan = embedded_plan(path)
    if plan is None:
        raise CheckpointError(
            f"{path} carries no plan of Kinema: made with --strip, or by another program",
            "the .json file of the same name has the plan, if it is still there",
            path=str(path),
        )
    says = f"made by Kinema {plan.kinema}; make it again with: kinema replay {path}"
    return _with_plan(path, "output", says, plan)


def _with_plan(path: Path, kind: str, says: str, plan: Plan) -> tuple[str, dict[str, Any]]:
    data = {"path": str(path), "kind": kind, "plan": plan.model_dump(mode="json")}
    return f"{path}\n  {says}\n\n{plan_text(plan)}", data


def _weights_text(facts: FileFacts, fits: list[str]) -> str:
    rows = {
        "component": facts.component.replace("_", " "),
        "structure": facts.structure,
        "models": ", ".join(fits),
        "dialect": f"{facts.dialect}, {facts.container}"
        + (f", {len(facts.files)} files" if len(facts.files) > 1 else ""),
        "dtype": facts.dtype,
        "quantised": f"{facts.quantisation}; {gigabytes(facts.packed_bytes)} stay packed" if facts.quantisation else "",
        "size": f"{facts.parameters:,} parameters in {facts.tensors} tensors, {gigabytes(facts.bytes)}",
        "likely role": f"{facts.name_suggests}-noise expert, by its name only" if facts.name_suggests else "",
        "tokenizer": "inside" if facts.has_tokenizer else "",
        "ignored": ", ".join(facts.ignored),
        "config": ", ".join(f"{name}={value}" for name, value in facts.config.items()),
    }
    return "\n".join([str(facts.path), *(f"  {name:<12} {value}" for name, value in rows.items() if value)])
