"""Plans and models as text for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from kinema.catalog.files import Store, load_store
from kinema.catalog.folders import Folders
from kinema.catalog.installed import find_files
from kinema.cli.tables import facts_table, table, text_of
from kinema.cli.tell import duration, gigabytes
from kinema.errors import CatalogError
from kinema.planning.memory import block_parameters
from kinema.schema import CatalogEntry, ModelRef, Plan, Settings, flag


def plan_text(plan: Plan) -> str:
    """Return a plan as a page: what, from which files, how long, step by step, what it will cost."""
    costs = [_costs(plan)] if plan.costs else []
    notes = (f"note: {note.text}" for note in plan.notes)
    return text_of(_facts(plan), _files(plan), _steps(plan), *costs, *notes)


def _facts(plan: Plan) -> Table:
    channels, latent_frames, rows, columns = plan.latent
    facts = {
        "model": f"{plan.model} ({plan.title})",
        "licence": plan.licence,
        "task": plan.task,
        "prompt": plan.prompt,
        "negative": plan.negative,
        "size": f"{plan.width}x{plan.height}",
        "frames": f"{plan.frames} at {plan.fps:g} fps, {plan.frames / plan.fps:.2f} s"
        if plan.frames > 1
        else "1 image",
        "latent grid": f"{latent_frames} frames of {columns}x{rows}, {channels} channels; {plan.tokens} tokens",
        "clips": f"{len(plan.clips)} of {plan.clips[0].frames} frames" if plan.clips else "",
        "sound": f"{plan.sound.path}, {plan.sound.seconds:.2f} s from {plan.sound.start:.4g} s" if plan.sound else "",
        "images": ", ".join(f"{image.role} {image.path}" for image in plan.images),
        "videos": ", ".join(f"{video.role} {video.path}, {video.frames} frames" for video in plan.videos),
        "camera": plan.request.camera or "",
        "motion": f"bucket {plan.motion.bucket_id} of 0 to 100" if plan.motion else "",
        "seeds": ", ".join(map(str, plan.seeds)),
        "sampling": f"{plan.solver}, {len(plan.steps)} steps, shift {plan.shift:g}"
        + (f", boundary {plan.boundary:g}" if plan.boundary is not None else "")
        + (f", guidance {plan.flux.guidance:g}" if plan.flux and plan.flux.guidance is not None else ""),
        "loras": "\n".join(lora.said for lora in plan.loras),
        "preset": plan.preset or "",
        "runs on": f"{plan.device}, {plan.precision}",
        "memory": "; ".join(_memory(plan)),
        "output": ", ".join(str(path) for paths in plan.output.paths for path in paths),
    }
    return facts_table((name, value) for name, value in facts.items() if value)


def _memory(plan: Plan) -> list[str]:
    """How the run keeps within its memory, and which of it the user decided."""
    said = [f"within {gigabytes(plan.limits.device)}"] if plan.limits.device else []
    if plan.device != "cpu" and plan.limits.host:
        said.append(f"{gigabytes(plan.limits.host)} on the host")
    said += memory_choices(plan)
    given = ", ".join(_asked(plan, field) for field in plan.limits.given)
    return [*said, f"as asked: {given}"] if given else said


def memory_choices(plan: Plan) -> list[str]:
    """Return what a plan does to keep within its memory, in words."""
    expert = next(iter(plan.experts.values()))
    count, stay = len(block_parameters(expert)), expert.resident_blocks
    encoder, said = plan.text_encoder, list[str]()
    if stay is not None:
        said.append(f"{stay} of {count} blocks of the DiT stay, the others are streamed")
    elif plan.device != "cpu":
        said.append(f"all {count} blocks of the DiT stay")
    said += [f"feed-forward {expert.ffn_tokens} tokens at a time"] if expert.ffn_tokens else []
    said += ["text encoder streamed"] if encoder.resident_blocks is not None else []
    said += ["text encoder on the CPU"] if encoder.device == "cpu" and plan.device != "cpu" else []
    said += ["VAE cache on the host"] if plan.vae_cache == "cpu" else []
    said += [f"VAE in tiles of {plan.tile} pixels"] if plan.tile else []
    return [*said, f"VAE takes {plan.chunk} latent frames at a time"] if plan.chunk > 1 else said


def _asked(plan: Plan, field: str) -> str:
    value = getattr(plan.request, field)
    return f"{flag(field)} {gigabytes(value) if field in ('vram', 'ram') else value}"


def _files(plan: Plan) -> Table:
    refs: dict[str, ModelRef] = {
        f"dit {expert}" if expert != "model" else "dit": ref for expert, ref in plan.experts.items()
    }
    refs |= {"text encoder": plan.text_encoder, "vae": plan.vae}
    refs |= {"clip vision": plan.clip_vision} if plan.clip_vision else {}
    if plan.flux:
        parts = {"clip text": plan.flux.clip_text, "siglip": plan.flux.siglip, "redux": plan.flux.redux}
        refs |= {name: ref for name, ref in parts.items() if ref}
    refs |= {"audio encoder": plan.audio_encoder} if plan.audio_encoder else {}
    refs |= {"motion controller": plan.motion.controller} if plan.motion else {}
    rows = []
    for name, ref in refs.items():
        files = str(ref.files[0]) + (f" and {len(ref.files) - 1} more" if len(ref.files) > 1 else "")
        rows.append((name, files, ref.dialect, _held(ref), gigabytes(ref.bytes)))
    return table(("part", "file", "dialect", "held as", "size"), rows, numbers=("size",))


def _held(ref: ModelRef) -> str:
    """How the weights are held and computed in."""
    how = f"{ref.dtype}, multiplied in fp8" if ref.fp8_matmul else ref.dtype
    return f"{ref.quantisation} in {how}" if ref.quantisation else how


def _steps(plan: Plan) -> Table:
    numbers = ("step", "sigma", "timestep", "guidance")
    rows = []
    for number, step in enumerate(plan.steps, 1):
        expert = "" if step.expert == "model" else step.expert
        rows.append((f"{number}", f"{step.sigma:.6f}", f"{step.timestep:g}", f"{step.guidance:g}", expert))
    return table((*numbers, "expert"), rows, numbers)


def _costs(plan: Plan) -> Table:
    on_cpu = plan.device == "cpu"
    numbers = ("peak memory", "mapped files" if on_cpu else "host memory", "time")
    rows = []
    for cost in plan.costs:
        beside = cost.mapped_bytes if on_cpu else cost.host_bytes
        seconds = "not measured yet" if cost.seconds is None else duration(cost.seconds)
        rows.append((cost.stage, gigabytes(cost.peak_bytes), gigabytes(beside), seconds))
    return table(("stage", *numbers), rows, numbers)


def models_text(settings: Settings) -> tuple[str, list[dict[str, Any]]]:
    """Return the catalog as a table, and as data: every model, what it takes, where it is installed."""
    shown, data = [], []
    told = {"name", "title", "aliases", "takes", "needs", "licence"}
    store, folders = load_store(settings.catalogs), Folders.of(settings)
    for entry in store.models.values():
        files, lacks = _installed(entry, store, folders)
        takes, size = ", ".join(("text", *entry.takes)), f"{entry.size[0]}x{entry.size[1]}"
        shown.append((entry.name, entry.title, takes, size, str(entry.frames), "yes" if files else "no"))
        data.append(
            entry.model_dump(mode="json", include=told) | {"installed": bool(files), "files": files, "missing": lacks}
        )
    columns = ("model", "what it is", "takes", "size", "frames", "installed")
    searched = f"searched: {', '.join(map(str, settings.models)) or 'no folder'}"
    return text_of(table(columns, shown), searched), data


def _installed(entry: CatalogEntry, store: Store, folders: Folders) -> tuple[dict[str, str], str]:
    try:
        chosen = find_files(entry, store, folders)
        return {role: str(path) for role, path in chosen.files.items()}, ""
    except CatalogError as error:
        return {}, error.message
