"""From an output back to a plan that can run: the same files, by hash, and names that overwrite nothing."""

from __future__ import annotations

from pathlib import Path

from kinema.cli.inspection import embedded_plan
from kinema.errors import CheckpointError
from kinema.schema import Note, OutputPlan, Plan


def replay_plan(path: Path, cache: Path | None, *, allow_changed: bool = False) -> Plan:
    """Return the plan `path` carries, checked against the files of this machine, writing beside it.

    allow_changed   files of other content become a Note instead of an error.

    Raises CheckpointError for a file without a plan, and for files that are missing or changed.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "check the path", path=str(path))
    plan = embedded_plan(path)
    if plan is None:
        raise CheckpointError(
            f"{path} carries no plan: made with --strip, or by another program",
            "replay the .json file beside it, if there is one",
            path=str(path),
        )
    changed = _changed(plan, cache)
    if changed and not allow_changed:
        raise CheckpointError(
            "; ".join(changed),
            "put the same files back, or pass --allow-changed to make another video",
            path=str(path),
            key=changed,
        )
    notes = tuple(Note(about="files", text=text) for text in changed)
    return plan.model_copy(update={"output": _beside(plan, path), "notes": (*plan.notes, *notes)})


def _changed(plan: Plan, cache: Path | None) -> list[str]:
    """Return one sentence for each file, weights or image, that is not the one the plan was run with."""
    from kinema.weights.hashes import HashCache

    absent = [file for file in plan.files if not file.is_file()]
    if absent:
        raise CheckpointError(
            f"{absent[0]} is not there" + (f", nor are {len(absent) - 1} others" if len(absent) > 1 else ""),
            "put the files of the plan back; kinema inspect shows the plan",
            path=str(absent[0]),
        )
    hashes = HashCache(cache / "hashes.json" if cache else None)
    sentences = []
    for file in plan.files:
        expected = plan.hashes.get(str(file))
        if expected is None:
            sentences.append(f"{file} has no hash in the plan, so nothing says it is the same")
        elif (found := hashes.sha256(file)) != expected:
            sentences.append(f"{file} has changed: sha256 {found[:12]}, the plan was run with {expected[:12]}")
    return sentences


def _beside(plan: Plan, path: Path) -> OutputPlan:
    """The outputs of the plan under free names: NAME-replay, NAME-replay-2, ..."""
    number = 1
    while True:
        tail = "-replay" if number == 1 else f"-replay-{number}"
        paths = tuple(tuple(_renamed(path.parent / file.name, tail) for file in files) for files in plan.output.paths)
        if not any(file.exists() for files in paths for file in files):
            return plan.output.model_copy(update={"paths": paths, "preview": None})
        number += 1


def _renamed(file: Path, tail: str) -> Path:
    for ending in (".latents.safetensors", "-frames", file.suffix):
        if ending and file.name.endswith(ending):
            return file.with_name(file.name.removesuffix(ending) + tail + ending)
    return file.with_name(file.name + tail)
