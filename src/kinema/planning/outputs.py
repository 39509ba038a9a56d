"""Where the results of a plan go: kinds, names, and never over a file that is there; and the plan back out of one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kinema.errors import CheckpointError, MachineError, RequestError
from kinema.schema import Facts, Note, OutputKind, OutputPlan, Plan, Request

PLAN_KEY = "kinema"
"""Metadata key under which an output file carries its plan."""

SUFFIXES: dict[str, OutputKind] = {
    ".mp4": "mp4",
    ".webm": "webm",
    ".gif": "gif",
    ".webp": "webp",
    ".png": "png",
    ".safetensors": "latents",
}
DEFAULT_FOLDER = Path("outputs")
LONGEST_NAME = 48  # letters of the prompt in a file's name, whole words where it has any


def parse_plan(text: str, path: Path) -> Plan:
    """Return the plan that `path` carries as `text`; CheckpointError for one this version cannot read."""
    try:
        return Plan.model_validate_json(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path} holds a plan that this version cannot read: {str(error).splitlines()[0]}",
            "use the version of Kinema that made it",
            path=str(path),
        ) from error


def output_folder(request: Request) -> Path:
    """Return the folder the outputs of this request go to."""
    save = request.save or DEFAULT_FOLDER
    return save.parent if save.suffix else save


def plan_output(
    request: Request, facts: Facts, seeds: Sequence[int], frames: int, prompt: str, notes: list[Note]
) -> OutputPlan:
    """Return kinds and paths of every output; RequestError where they would overwrite or contradict."""
    kinds = _kinds(request, frames)
    if request.preview is not None and request.preview.suffix.lower() != ".png":
        raise RequestError(
            f"preview {request.preview} is a .png picture or nothing",
            f"pass --preview {request.preview.with_suffix('.png')}",
            field="preview",
            got=str(request.preview),
            allowed=".png",
        )
    named = request.save is not None and bool(request.save.suffix)
    folder = output_folder(request)
    taken = set(facts.existing)
    paths = []
    for seed in seeds:
        stem = _stem(request, prompt, seed, several=len(seeds) > 1)
        if not named:
            stem = _free_stem(stem, kinds, frames, request.strip, taken)
        files = tuple(folder / _name(stem, kind, frames) for kind in kinds)
        for file in (*files, *sidecars(files, request.strip)):
            if named and file.name in taken and not request.overwrite:
                raise RequestError(
                    f"{file} exists already",
                    "pass another --save, or --overwrite to replace it",
                    field="save",
                    got=str(file),
                )
            taken.add(file.name)
        paths.append(files)
    if request.strip and "latents" in kinds:
        notes.append(Note(about="strip", text="the latents file keeps the plan: nothing could decode it without"))
    _check_space(facts, frames, seeds, folder)
    return OutputPlan(
        kinds=kinds,
        paths=tuple(paths),
        quality=80 if request.quality is None else request.quality,
        preview=request.preview,
        strip=request.strip,
    )


def _kinds(request: Request, frames: int) -> tuple[OutputKind, ...]:
    suffix = request.save.suffix.lower() if request.save else ""
    if suffix and suffix not in SUFFIXES:
        raise RequestError(
            f"save {request.save} ends in {suffix}; known are {', '.join(SUFFIXES)}",
            f"pass --save {request.save.with_suffix('.mp4') if request.save else ''}",
            field="save",
            got=str(request.save),
            allowed=list(SUFFIXES),
        )
    default: OutputKind = "png" if frames == 1 else "mp4"
    kinds = request.output or ((SUFFIXES[suffix],) if suffix else (default,))
    if suffix and SUFFIXES[suffix] not in kinds:
        raise RequestError(
            f"save {request.save} is a {SUFFIXES[suffix]} file but output asks for {', '.join(kinds)}",
            f"pass --output {SUFFIXES[suffix]}, or another --save",
            field="output",
            got=",".join(kinds),
        )
    if len(set(kinds)) < len(kinds):
        raise RequestError(
            f"output {','.join(kinds)} names a kind twice", "name each kind once", field="output", got=",".join(kinds)
        )
    return tuple(kinds)


def _stem(request: Request, prompt: str, seed: int, several: bool) -> str:
    if request.save and request.save.suffix:
        stem = request.save.name.removesuffix(request.save.suffix).removesuffix(".latents")
        return f"{stem}-{seed}" if several else stem
    words = re.sub(r"[^\w]+", "-", prompt.casefold()).strip("-")
    if len(words) > LONGEST_NAME:
        words = words[: LONGEST_NAME + 1].rpartition("-")[0] or words[:LONGEST_NAME]
    return f"{words or 'video'}-{seed}"


def _name(stem: str, kind: OutputKind, frames: int) -> str:
    if kind == "latents":
        return f"{stem}.latents.safetensors"
    if kind == "png" and frames > 1:
        return f"{stem}-frames"
    return f"{stem}.{kind}"


def sidecars(files: Sequence[Path], strip: bool) -> list[Path]:
    """Return the file the plan is written to beside these outputs; none for latents alone, which carry it."""
    made = [file for file in files if not file.name.endswith(".latents.safetensors")]
    if strip or not made:
        return []
    stem = made[0].name if made[0].name.endswith("-frames") else made[0].stem
    return [made[0].with_name(f"{stem}.json")]


def _free_stem(stem: str, kinds: Sequence[OutputKind], frames: int, strip: bool, taken: set[str]) -> str:
    def names(stem: str) -> set[str]:
        files = [Path(_name(stem, kind, frames)) for kind in kinds]
        return {file.name for file in (*files, *sidecars(files, strip))}

    number, candidate = 1, stem
    while names(candidate) & taken:
        number += 1
        candidate = f"{stem}-{number}"
    return candidate


def _check_space(facts: Facts, frames: int, seeds: Sequence[int], folder: Path) -> None:
    need = len(seeds) * (4_000_000 + 200_000 * frames)
    if facts.output_free is not None and facts.output_free < need:
        raise MachineError(
            f"{folder} has {facts.output_free / 1e6:.0f} MB free; "
            f"{len(seeds)} output(s) of {frames} frames may need {need / 1e6:.0f} MB",
            "free some space, or pass --save another folder",
            need=need,
            have=facts.output_free,
        )
