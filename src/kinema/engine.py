"""The order of verbs: plan -> load, encode, sample, decode, finish, told as events.

Keeps models and encoded inputs from one run to the next. Owns stages, progress, cancelling and what is
kept when finishing fails; what the verbs do is in ops, what is decided is in the plan.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kinema import ops
from kinema.clips.kept import CLIPS_SUFFIX, KeptClips
from kinema.clips.loop import Branches, make_clips
from kinema.clips.tasks import clip_task
from kinema.conditioning import media_conditions
from kinema.conditioning_flux import flux_conditions
from kinema.errors import Cancelled, KinemaError, MachineError, NumericsError, OutputError
from kinema.kept_steps import STEPS_SUFFIX, KeptSteps, read_steps
from kinema.media.background import BackgroundWriter
from kinema.media.files import write_whole
from kinema.media.preview import preview_rgb
from kinema.media.video import write
from kinema.models.encoders import UMT5, encode_padded, encode_prompts
from kinema.models.wan_vae import WanVAE
from kinema.planning import make_plan, memory, output_folder, plan_output, sidecars
from kinema.planning.cost import work
from kinema.planning.inputs import encodes
from kinema.residents import BackgroundHashes, Residents
from kinema.runtime.finite import first_nonfinite
from kinema.runtime.machine import (
    PeakMemory,
    free_memory,
    is_out_of_memory,
    keep_large_blocks_apart,
    record_calibration,
)
from kinema.sampling.denoiser import Branch, noise, noised, sample
from kinema.sampling.solvers import Step
from kinema.schema import (
    Event,
    Expert,
    Facts,
    LoraPlan,
    MediaFacts,
    ModelRef,
    Note,
    OutputKind,
    Plan,
    Preview,
    Progress,
    Request,
    Result,
    Settings,
    StageReport,
)
from kinema.survey import existing_names, survey
from kinema.tensors import Conditions, Media
from kinema.text_cache import TextCache, text_files, text_key
from kinema.version import VERSION
from kinema.weights.load import load_tokenizer

Stop = Callable[[], bool]

KEPT_TEXTS = 32
"""Encoded texts kept from run to run; a long one of the full-size encoder takes 8 MB."""


class Stages:
    """What each stage of one run took; repeated stages (several seeds) add up in time."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._reports: dict[str, StageReport] = {}
        self._counts: Counter[str] = Counter()
        self.now = ""

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        began, self.now = time.perf_counter(), stage
        with PeakMemory(self._device) as peak:
            yield
        seconds = time.perf_counter() - began
        self._counts[stage] += 1
        before = self._reports.get(stage)
        self._reports[stage] = StageReport(
            stage=stage,
            seconds=seconds + (before.seconds if before else 0),
            peak_bytes=max(peak.bytes, before.peak_bytes if before else 0),
        )

    @property
    def reports(self) -> tuple[StageReport, ...]:
        return tuple(self._reports.values())

    def mean_seconds(self) -> dict[str, float]:
        """Return seconds of one go of each stage: of one seed, where it is run for each."""
        return {stage: report.seconds / self._counts[stage] for stage, report in self._reports.items()}


class Meter:
    """Counts the units of one stage into Progress events, with the time left at the pace so far.

    The first unit is left out of the pace as soon as there is a second: it loads and prepares.
    """

    def __init__(
        self, stage: str, total: int, seed: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._stage, self._total, self._seed, self._clock = stage, total, seed, clock
        self._done = 0
        self._since, self._since_done = clock(), 0

    def start(self) -> Progress:
        return Progress(stage=self._stage, done=self._done, total=self._total, seed=self._seed)

    def tick(self, units: int = 1) -> Progress:
        now = self._clock()
        first, self._done = self._done == 0, self._done + units
        pace = (now - self._since) / (self._done - self._since_done)
        if first:
            self._since, self._since_done = now, self._done
        return Progress(
            stage=self._stage,
            done=self._done,
            total=self._total,
            eta_seconds=pace * (self._total - self._done),
            seed=self._seed,
        )


class Engine:
    """Plans requests and runs plans; models stay loaded from one run to the next. A context manager.

    Not for several threads at once: one engine runs one plan at a time.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._models = Residents()
        self._hashes = BackgroundHashes(self.settings.cache)
        self._texts: dict[tuple[ModelRef, int, str], Tensor] = {}
        self._new_texts: list[str] = []
        self._text_cache = TextCache(self.settings.cache / "texts" if self.settings.cache else None)
        keep_large_blocks_apart()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all models and stop background work."""
        self.release()
        self._hashes.close()

    def release(self) -> None:
        """Drop all models and encoded texts, and give their memory back."""
        self._models.clear()
        self._texts.clear()

    def plan(self, request: Request, promised: Mapping[Path, MediaFacts] | None = None) -> Plan:
        """Return the plan of a request; every fault that can be known raises here, before a weight is loaded.

        promised  inputs that are not there yet, and what they will be.
        """
        entry, facts = survey(request, self.settings, promised or {})
        return make_plan(request, entry, facts)

    def run(self, plan: Plan, cancelled: Stop = lambda: False) -> Iterator[Event]:
        """Yield what happens, one Result a seed. `cancelled` is asked between steps; so is closing the generator.

        Raises NumericsError rather than deliver a broken video, OutputError (with the latents kept and the
        command that finishes the job) where decoding or writing fails, Cancelled. Where memory runs out, MachineError
        with what would fit: all of it is then free again, and the next run may come.
        """
        yield from plan.notes
        stages = Stages(plan.device)
        self._hashes.begin(plan.files)
        yield from self._within_memory(plan, stages, self._run(plan, stages, cancelled))

    def _run(
        self, plan: Plan, stages: Stages, cancelled: Stop, first: int = 0, after: Step | None = None
    ) -> Iterator[Event]:
        """All seeds from number `first` on, of which that one goes on behind the step `after`."""
        if plan.clips:
            for index in range(len(plan.seeds)):
                single = self._single(plan, index)
                yield from self._clips(single, KeptClips(single, _beside(single, CLIPS_SUFFIX)), stages, cancelled)
        else:
            conditions = yield from self._encode(plan, stages, cancelled)
            for index, seed in list(enumerate(plan.seeds))[first:]:
                start = noise(seed, (1, *plan.latent))
                done = after.index + 1 if after is not None else 0
                meter = Meter("sample", len(plan.steps) - done, seed)
                single = self._single(plan, index)
                kept = KeptSteps(plan, index, _beside(single, STEPS_SUFFIX))
                try:
                    latents_CFhw = yield from self._sample(
                        plan, start, conditions, stages, cancelled, meter, kept, after
                    )
                except Exception as error:
                    if not kept.hint():
                        raise
                    raise _hinted(error, kept.hint(), steps=str(kept.path)) from error
                yield from self._finish(single, seed, latents_CFhw, stages, cancelled)
                kept.remove()
                after = None
        self._keep_texts(plan)
        self._calibrate(plan, stages)

    def _within_memory(self, plan: Plan, stages: Stages, running: Iterator[Event]) -> Iterator[Event]:
        """What happens; where memory runs out, everything is dropped and the error says what would fit."""
        ended: OutputError | None = None
        try:
            yield from running
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Its frames hold the tensors that took the memory: only what it said is kept.
            ended = OutputError(str(error), **getattr(error, "details", {}))
        if ended is None:
            return
        self.release()
        free = free_memory(plan.device)
        fits = memory.smaller(plan, stages.now, free)
        kept = next((ended.details[name] for name in ("latents", "steps", "clips") if name in ended.details), None)
        verb = "decode" if "latents" in ended.details else "resume"
        hints = ["pass " + ", or ".join(fits)] if fits else ["take a smaller model, or another machine"]
        hints += [f"what is done is kept: kinema {verb} {kept}"] if kept else []
        raise MachineError(
            f"memory ran out in the stage {stages.now}: {ended.message.splitlines()[0][:200]}",
            "; ".join(hints),
            **{**ended.details, "stage": stages.now, "have": free, "fits": fits},
        )

    def resume(self, path: Path, request: Request | None = None, cancelled: Stop = lambda: False) -> Iterator[Event]:
        """Go on with a video that was stopped: from a file of saved steps, or from a folder of finished clips.

        It goes where it was meant to, or, clips, where the output fields of `request` say. Raises as `run` does.
        """
        if path.is_dir():
            kept = KeptClips.open(path)
            plan = self._output_as_asked(path, kept.plan, request or Request())
            stages = Stages(plan.device)
            self._hashes.begin(plan.files)
            yield from self._within_memory(plan, stages, self._clips(plan, kept, stages, cancelled))
            return
        plan, index, after = read_steps(path)
        stages = Stages(plan.device)
        self._hashes.begin(plan.files)
        yield from self._within_memory(plan, stages, self._run(plan, stages, cancelled, index, after))
        path.unlink(missing_ok=True)

    def decode(self, path: Path, request: Request | None = None, cancelled: Stop = lambda: False) -> Iterator[Event]:
        """Make the video of a latents file, beside it or where the output fields of `request` say.

        path   or a folder of finished clips, of which the video is made as far as it goes; the folder stays.
        """
        kept = KeptClips.open(path) if path.is_dir() else None
        latents_CFhw, plan = ops.read_latents(path) if kept is None else (kept.latents[0], kept.plan)
        if plan.clips:
            finished = kept.latents if kept else list(latents_CFhw.split(plan.latent[1], dim=1))
            plan, kept = plan.shortened(len(finished)), KeptClips(plan, None, finished)
        plan = self._output_as_asked(path, plan, request or Request())
        self._hashes.begin(plan.files)
        stages = Stages(plan.device)
        if kept is not None:
            yield from self._clips(plan, kept, stages, cancelled)
        else:
            finishing = self._finish(plan, plan.seeds[0], latents_CFhw, stages, cancelled, kept=path)
            yield from self._within_memory(plan, stages, finishing)

    # --- stages --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _encode(self, plan: Plan, stages: Stages, cancelled: Stop) -> Generator[Event, None, dict[Branch, Conditions]]:
        rows = yield from self._encode_prompts(plan, stages)
        if plan.flux is not None:
            _stop_if(cancelled)
            return flux_conditions(plan, rows, partial(self._get, plan))
        if encodes(plan):
            _stop_if(cancelled)
            with stages.measure("encode images"):
                yield (meter := Meter("encode images", 1)).start()
                given = media_conditions(plan, partial(self._get, plan))
                yield meter.tick()
        else:
            given = media_conditions(plan, partial(self._get, plan))
        return {branch: replace(given, text=(text,)) for branch, text in rows.items()}

    @torch.inference_mode()
    def _encode_prompts(self, plan: Plan, stages: Stages) -> Generator[Event, None, dict[Branch, Tensor]]:
        """Rows of the prompt and, where there is guidance, of the negative prompt."""
        texts = [plan.prompt]
        if any(step.guidance != 1.0 for step in plan.steps):
            texts.append(plan.negative)
        yield (meter := Meter("encode text", 1)).start()
        # Texts out of memory say nothing of the encoder's speed: they are no stage.
        known = all((plan.text_encoder, plan.text_len, text) in self._texts for text in texts)
        with nullcontext() if known else stages.measure("encode text"):
            rows = self._encode_texts(plan, texts)
        yield meter.tick()
        branches: tuple[Branch, ...] = ("cond", "uncond")
        return dict(zip(branches, rows, strict=False))

    def _encode_texts(self, plan: Plan, texts: list[str]) -> list[Tensor]:
        """Rows of each text, from memory where it was encoded before."""
        keys = [(plan.text_encoder, plan.text_len, text) for text in texts]
        hashes = self._hashes.ready(text_files(plan))
        for text, key in zip(texts, keys, strict=True):
            name = text_key(plan, text, hashes) if key not in self._texts else None
            rows = self._text_cache.get(name) if name else None
            if rows is not None:
                self._texts[key] = rows
        new = [text for text, key in zip(texts, keys, strict=True) if key not in self._texts]
        self._new_texts += new
        if new:
            encoder = cast(UMT5, self._get(plan, plan.text_encoder))
            ref = plan.text_encoder
            tokenizer = load_tokenizer(ref.files, ref.tokenizer, ref.component)
            encode = encode_padded if ref.component == "t5" else encode_prompts
            for text, rows in zip(new, encode(encoder, tokenizer, new, plan.text_len), strict=True):
                self._texts[plan.text_encoder, plan.text_len, text] = rows
        wanted = {key: self._texts[key] for key in keys}
        # The negative prompt of a batch is asked for again and again, so what was asked for last is kept.
        older = {key: rows for key, rows in self._texts.items() if key not in wanted}
        self._texts = dict(list({**older, **wanted}.items())[-KEPT_TEXTS:])
        return [wanted[key] for key in keys]

    def _keep_texts(self, plan: Plan) -> None:
        """Put what was encoded in this run on disk: by now the hashes of the encoder's files are there."""
        new, self._new_texts = self._new_texts, []
        if new and self.settings.cache is not None:
            hashes = self._hashes.collect(plan.files)
            for text in new:
                rows, name = self._texts.get((plan.text_encoder, plan.text_len, text)), text_key(plan, text, hashes)
                if rows is not None and name is not None:
                    self._text_cache.put(name, rows)

    @torch.inference_mode()
    def _sample(
        self,
        plan: Plan,
        start_BCFhw: Tensor,
        conditions: Mapping[Branch, Conditions],
        stages: Stages,
        cancelled: Stop,
        meter: Meter,
        kept: KeptSteps | None = None,
        after: Step | None = None,
    ) -> Generator[Event, None, Tensor]:
        device = torch.device(plan.device)
        together = any(ref.resident_blocks is not None for ref in plan.experts.values())
        velocity = ops.Velocity(partial(self._expert, plan), conditions, device, together)
        first = plan.experts[plan.steps[after.index + 1 if after else 0].expert]
        after = after and replace(after, memory=tuple(tensor.to(device) for tensor in after.memory))
        _stop_if(cancelled)
        if first not in self._models:
            with stages.measure("load"):
                yield (loading := Meter("load", 1)).start()
                self._get(plan, first)
                yield loading.tick()
            _stop_if(cancelled)
        clean = conditions["cond"].clean_BCFhw
        start_BCFhw = start_BCFhw.to(device)
        if (source := conditions["cond"].source_BCFhw) is not None:
            start_BCFhw = noised(source.to(device), start_BCFhw, plan.steps[0].sigma)
        factors = ops.preview_factors(plan) if plan.output.preview is not None else None
        with stages.measure("sample"):
            yield meter.start()
            try:
                for step in sample(plan.steps, plan.solver, start_BCFhw, velocity, clean, after):
                    if kept is not None:
                        kept.keep(step)
                    yield meter.tick()
                    _stop_if(cancelled)
                    if plan.output.preview is not None:
                        yield self._preview(plan, step.index, ops.of_video(plan, step.x0[0]), factors)
            except NumericsError as error:
                raise _located(error, velocity.last) from error
        return ops.of_video(plan, step.x[0]).cpu()

    def _preview(self, plan: Plan, index: int, latents_CFhw: Tensor, factors: Tensor | None) -> Preview:
        path = cast(Path, plan.output.preview)
        path.parent.mkdir(parents=True, exist_ok=True)
        middle = latents_CFhw.shape[1] // 2
        frame = preview_rgb(latents_CFhw[:, middle : middle + 1].cpu(), factors)
        media = Media(iter([ops.enlarged(frame, plan.height, plan.width)]), 1, plan.width, plan.height, plan.fps, {})
        write(media, path, "png")
        return Preview(step=index + 1, path=path)

    @torch.inference_mode()
    def _finish(
        self,
        plan: Plan,
        seed: int,
        latents_CFhw: Tensor,
        stages: Stages,
        cancelled: Stop,
        kept: Path | None = None,
    ) -> Iterator[Event]:
        """Decode and write the outputs of one seed; its latents are on disk before, and stay there on failure."""
        plan = self._with_origins(plan)
        yield from _lora_notes(plan)
        paths = dict(zip(plan.output.kinds, plan.output.paths[0], strict=True))
        asked = paths.pop("latents", None)
        safe = kept or _keep(ops.latents_bytes(latents_CFhw, plan), asked or _beside(plan, ".latents.safetensors"))
        if paths:
            try:
                with stages.measure("decode"):
                    frames = ops.decode_frames(cast(ops.VAE, self._get(plan, plan.vae)), latents_CFhw, plan)
                    yield from self._write(plan, seed, frames, paths, cancelled)
            except Exception as error:
                raise _unfinished(error, safe) from error
            if asked is None and kept is None:
                safe.unlink()
        yield Result(seed=seed, paths=plan.output.paths[0], plan=plan, stages=stages.reports)

    def _write(
        self,
        plan: Plan,
        seed: int,
        frames: Iterable[Tensor | Event],
        paths: Mapping[OutputKind, Path],
        cancelled: Stop,
    ) -> Iterator[Event]:
        """Write frames as they come, every file in a thread of its own; pass on the events among them."""
        metadata = {} if plan.output.strip else {ops.PLAN_KEY: plan.model_dump_json(exclude_none=True)}

        def write_one(path: Path, kind: OutputKind, chunks: Iterator[Tensor]) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            media = Media(chunks, plan.frames, plan.width, plan.height, plan.fps, metadata, plan.sound)
            write(media, path, kind, plan.output.quality)

        yield (meter := Meter("decode", plan.frames, seed)).start()
        with ExitStack() as stack:
            writers = [
                stack.enter_context(BackgroundWriter(partial(write_one, path, kind))) for kind, path in paths.items()
            ]
            for item in frames:
                if not isinstance(item, Tensor):
                    yield item
                    continue
                _stop_if(cancelled)
                for writer in writers:
                    writer.add(item)
                yield meter.tick(len(item))
        for beside in sidecars(tuple(paths.values()), plan.output.strip):
            write_whole(beside, plan.model_dump_json(exclude_none=True, indent=2).encode())

    # --- clip by clip --------------------------------------------------------------------------------

    def _clips(self, plan: Plan, kept: KeptClips, stages: Stages, cancelled: Stop) -> Iterator[Event]:
        """Make one video clip by clip. Finished clips stay in `kept` until all of it is written."""
        seed, paths = plan.seeds[0], dict(zip(plan.output.kinds, plan.output.paths[0], strict=True))
        asked = paths.pop("latents", None)
        try:
            frames = self._clip_frames(plan, seed, kept, stages, cancelled)
            # Hashes are waited for when the first frames are there, not before.
            opening = yield from _events_before(frames)
            plan = self._with_origins(plan)
            yield from _lora_notes(plan)
            yield from self._write(plan, seed, chain(opening, frames), paths, cancelled)
            if asked is not None:
                write_whole(asked, ops.latents_bytes(torch.cat(kept.latents, dim=1), plan))
        except Exception as error:
            if not kept.hint():
                raise
            raise _hinted(error, kept.hint(), clips=str(kept.folder)) from error
        kept.remove()
        yield Result(seed=seed, paths=plan.output.paths[0], plan=plan, stages=stages.reports)

    @torch.inference_mode()
    def _clip_frames(
        self, plan: Plan, seed: int, kept: KeptClips, stages: Stages, cancelled: Stop
    ) -> Iterator[Event | Tensor]:
        """Yield what happens and the frames of all clips; those finished before are only decoded."""
        rows: dict[Branch, Tensor] = {}
        if len(kept) < len(plan.clips):
            rows = yield from self._encode_prompts(plan, stages)
        with stages.measure("encode inputs"):
            yield (inputs := Meter("encode inputs", 1)).start()
            task = clip_task(plan, partial(self._get, plan), rows, partial(_stop_if, cancelled))
            yield inputs.tick()
        meter = Meter("sample", len(plan.steps) * (len(plan.clips) - len(kept)), seed)

        def sample_clip(number: int, conditions: Callable[[], Branches]) -> Generator[Event, None, Tensor]:
            _stop_if(cancelled)
            if number < len(kept):
                return kept.latents[number]
            told, start_BCFhw = conditions(), task.noise(number, seed)
            latents_CFhw = yield from self._sample(plan, start_BCFhw, told, stages, cancelled, meter)
            kept.add(latents_CFhw)
            return latents_CFhw

        yield from make_clips(plan.clips, task, sample_clip, stages.measure)

    # --- models --------------------------------------------------------------------------------------

    def _get(self, plan: Plan, ref: ModelRef) -> nn.Module:
        """The loaded model, with room for what it does in this plan."""
        module = self._models.get(ref, memory.need(plan, ref), memory.usable(plan))
        if isinstance(module, WanVAE):
            module.history_on_host = plan.vae_cache == "cpu"
        return module

    def _expert(self, plan: Plan, expert: Expert) -> ops.DiT:
        return cast(ops.DiT, self._get(plan, plan.experts[expert]))

    # --- small things --------------------------------------------------------------------------------

    def _single(self, plan: Plan, index: int) -> Plan:
        """The plan of one of several seeds: what its output file carries."""
        output = plan.output.model_copy(update={"paths": (plan.output.paths[index],)})
        return plan.model_copy(update={"seeds": (plan.seeds[index],), "output": output})

    def _with_origins(self, plan: Plan) -> Plan:
        """The plan with the hashes of its files, the versions that run it, and how much each LoRA changed weights."""
        hashes = self._hashes.collect(plan.files)
        return plan.model_copy(update={"hashes": hashes, "versions": versions(), "loras": self._changed(plan)})

    def _changed(self, plan: Plan) -> tuple[LoraPlan, ...]:
        sizes = {expert: list(self._models.changes(ref)) for expert, ref in plan.experts.items()}
        return tuple(
            lora.model_copy(update={"change": found.pop(0)}) if (found := sizes[lora.expert]) else lora
            for lora in plan.loras
        )

    def _output_as_asked(self, path: Path, plan: Plan, request: Request) -> Plan:
        """The plan with its outputs beside `path`, latents or a folder of clips, or where `request` says."""
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

    def _calibrate(self, plan: Plan, stages: Stages) -> None:
        if self.settings.cache is not None:
            file = self.settings.cache / "calibration.json"
            record_calibration(file, plan.device, work(plan), stages.mean_seconds())


def _lora_notes(plan: Plan) -> Iterator[Note]:
    return (Note(about="lora", text=lora.said) for lora in plan.loras)


def versions() -> dict[str, str]:
    """Return the versions of what makes a video."""
    return {"kinema": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def _stop_if(cancelled: Stop) -> None:
    if cancelled():
        raise Cancelled("stopped as asked; no file was left half-written")


def _beside(plan: Plan, suffix: str) -> Path:
    """A free name beside the output: what lies there is somebody's finished work."""
    first = plan.output.paths[0][0]
    stem = first.name.removesuffix(first.suffix).removesuffix(".latents")
    tails = chain([""], (f"-{number}" for number in count(2)))
    paths = (first.with_name(f"{stem}{tail}{suffix}") for tail in tails)
    return next(path for path in paths if not path.exists())


def _events_before(frames: Iterator[Event | Tensor]) -> Generator[Event, None, list[Tensor]]:
    """Pass on what happens until frames come; return those."""
    for item in frames:
        if isinstance(item, Tensor):
            return [item]
        yield item
    return []


def _keep(data: bytes, path: Path) -> Path:
    """Write finished latents where the output goes, or in a new temporary folder; return where."""
    try:
        write_whole(path, data)
        return path
    except OutputError:
        elsewhere = Path(tempfile.mkdtemp(prefix="kinema-")) / path.name
        write_whole(elsewhere, data)
        return elsewhere


def _unfinished(error: Exception, latents: Path) -> KinemaError:
    """The error to raise when the video could not be made of finished latents: where they are, what to type."""
    hint = f"the finished latents are in {latents}; make the video with: kinema decode {latents}"
    return _hinted(error, hint, latents=str(latents))


def _hinted(error: Exception, hint: str, **details: Any) -> KinemaError:
    """The same error with one hint more. Foreign errors become ours."""
    if isinstance(error, KinemaError):
        return type(error)(error.message, f"{error.hint}\n{hint}".strip(), **{**error.details, **details})
    return OutputError(f"the video could not be made: {error}", hint, **details)


def _located(error: NumericsError, last: ops.LastCall | None) -> NumericsError:
    """The same error, naming the first layer whose output is not finite, if the last forward shows it."""
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
