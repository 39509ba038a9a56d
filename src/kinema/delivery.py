"""From latents and frames to files: outputs with the plan in them, previews, and latents kept until then."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain, count
from pathlib import Path

from torch import Tensor

from kinema import ops
from kinema.clips.kept import CLIPS_SUFFIX
from kinema.errors import OutputError
from kinema.media.background import BackgroundWriter
from kinema.media.files import write_whole
from kinema.media.preview import preview_rgb
from kinema.media.video import write
from kinema.planning import output_folder, plan_output, sidecars
from kinema.planning.outputs import PLAN_KEY
from kinema.progress import Meter, Run
from kinema.schema import Event, Facts, OutputKind, Plan, Preview, Request
from kinema.survey import existing_names
from kinema.tensors import Media


def write_frames(run: Run, frames: Iterable[Tensor | Event], paths: Mapping[OutputKind, Path]) -> Iterator[Event]:
    """Write frames_THWC as they come, every file in a thread of its own; pass on the events among them."""
    plan = run.plan
    metadata = {} if plan.output.strip else {PLAN_KEY: plan.model_dump_json(exclude_none=True)}

    def write_one(path: Path, kind: OutputKind, chunks: Iterator[Tensor]) -> None:
        media = Media(chunks, plan.frames, plan.width, plan.height, plan.fps, metadata, plan.sound)
        write(media, path, kind, plan.output.quality)

    yield (meter := Meter("decode", plan.frames, plan.seeds[0])).start()
    with ExitStack() as stack:
        writers = [
            stack.enter_context(BackgroundWriter(partial(write_one, path, kind))) for kind, path in paths.items()
        ]
        for item in frames:
            if not isinstance(item, Tensor):
                yield item
                continue
            run.stop_if_asked()
            for writer in writers:
                writer.add(item)
            yield meter.tick(len(item))
    for beside in sidecars(tuple(paths.values()), plan.output.strip):
        write_whole(beside, plan.model_dump_json(exclude_none=True, indent=2).encode())


def write_preview(plan: Plan, path: Path, index: int, latents_CFhw: Tensor, factors: Tensor | None) -> Preview:
    """Write a picture of the middle frame as it is after step `index`."""
    middle = latents_CFhw.shape[1] // 2
    frame = preview_rgb(latents_CFhw[:, middle : middle + 1].cpu(), factors)
    media = Media(iter([ops.enlarged(frame, plan.height, plan.width)]), 1, plan.width, plan.height, plan.fps, {})
    write(media, path, "png")
    return Preview(step=index + 1, path=path)


def keep_latents(latents_CFhw: Tensor, plan: Plan, path: Path) -> Path:
    """Write finished latents where the output goes, or in a new temporary folder; return where."""
    data = ops.latents_bytes(latents_CFhw, plan)
    try:
        write_whole(path, data)
        return path
    except OutputError:
        elsewhere = Path(tempfile.mkdtemp(prefix="kinema-")) / path.name
        write_whole(elsewhere, data)
        return elsewhere


def beside(plan: Plan, suffix: str) -> Path:
    """Return a free name beside the output: what lies there is somebody's finished work."""
    first = plan.output.paths[0][0]
    stem = first.name.removesuffix(first.suffix).removesuffix(".latents")
    tails = chain([""], (f"-{number}" for number in count(2)))
    paths = (first.with_name(f"{stem}{tail}{suffix}") for tail in tails)
    return next(path for path in paths if not path.exists())


def output_as_asked(path: Path, plan: Plan, request: Request | None) -> Plan:
    """Return the plan with its outputs beside `path`, latents or a folder of clips, or where `request` says."""
    request = request or Request()
    stem = path.name.removesuffix(".safetensors").removesuffix(".latents").removesuffix(CLIPS_SUFFIX)
    save = request.save or path.with_name(stem + ".mp4")
    before = () if request.save and request.save.suffix else plan.output.kinds
    kinds = request.output or tuple(kind for kind in before if kind != "latents")
    if request.save is None and kinds:
        save = save.with_suffix(f".{kinds[0]}")
    request = request.model_copy(update={"save": save, "output": kinds})
    facts = Facts(existing=existing_names(output_folder(request)))
    output = plan_output(request, facts, plan.seeds, plan.frames, plan.prompt, [])
    return plan.model_copy(update={"output": output})
