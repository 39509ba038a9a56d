"""The order of verbs: plan -> load, encode, sample, decode, finish, told as events.

Keeps models and encoded texts from one run to the next. What the verbs do is in ops, what is decided is in the plan;
how frames become files is in delivery, and how a run ends that cannot go on in endings.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from kinema import ops
from kinema.clips.kept import CLIPS_SUFFIX, KeptClips
from kinema.clips.loop import Branches, make_clips
from kinema.clips.tasks import clip_task
from kinema.conditioning import media_conditions
from kinema.conditioning_flux import flux_conditions, pooled_texts
from kinema.delivery import beside, keep_latents, output_as_asked, write_frames, write_preview
from kinema.endings import hinted, located, out_of_memory
from kinema.errors import NumericsError
from kinema.kept_steps import STEPS_SUFFIX, KeptSteps
from kinema.media.files import write_whole
from kinema.models.wan_vae import WanVAE
from kinema.planning import make_plan, memory
from kinema.planning.cost import step_work, work
from kinema.planning.inputs import encodes
from kinema.progress import Meter, Run
from kinema.residents import BackgroundHashes, Residents
from kinema.runtime.machine import (
    is_out_of_memory,
    keep_large_blocks_apart,
    keep_within,
    probe_machine,
    record_calibration,
)
from kinema.sampling.denoiser import Branch, noise, noised, sample
from kinema.schema import Event, Expert, LoraPlan, MediaFacts, ModelRef, Note, Plan, Request, Result, Settings
from kinema.survey import survey
from kinema.tensors import Conditions
from kinema.texts import Texts
from kinema.version import VERSION

Stop = Callable[[], bool]


class Engine:
    """Plans requests and runs plans; models stay loaded from one run to the next. A context manager.

    Not for several threads at once: one engine runs one plan at a time.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._models = Residents()
        self._hashes = BackgroundHashes(self.settings.cache)
        self._texts = Texts(self.settings.cache, self._hashes)
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
        run = Run.of(plan, cancelled)
        yield from self._within_memory(run, self._make(run))

    def resume(self, path: Path, request: Request | None = None, cancelled: Stop = lambda: False) -> Iterator[Event]:
        """Go on with a video that was stopped: from a file of saved steps, or from a folder of finished clips.

        It goes where it was meant to, or, clips, where the output fields of `request` say. Raises as `run` does.
        """
        if path.is_dir():
            clips = KeptClips.open(path, to_go_on=True)
            run = Run.of(output_as_asked(path, clips.plan, request), cancelled)
            yield from self._within_memory(run, self._make_clips(run, clips))
        else:
            steps = KeptSteps.open(path)
            run = Run.of(steps.plan, cancelled)
            yield from self._within_memory(run, self._make(run, steps))

    def decode(self, path: Path, request: Request | None = None, cancelled: Stop = lambda: False) -> Iterator[Event]:
        """Make the video of a latents file, beside it or where the output fields of `request` say.

        path   or a folder of finished clips, of which the video is made as far as it goes; the folder stays.
        """
        kept = KeptClips.open(path) if path.is_dir() else None
        latents_CFhw, plan = ops.read_latents(path) if kept is None else (kept.latents[0], kept.plan)
        run = Run.of(output_as_asked(path, plan, request), cancelled)
        if plan.clips:
            finished = kept.latents if kept else list(latents_CFhw.split(plan.latent[1], dim=1))
            run = replace(run, plan=run.plan.shortened(len(finished)))
            finishing = self._make_clips(run, KeptClips(run.plan, None, finished))
        else:
            finishing = self._finish(run, latents_CFhw, kept=path)
        yield from self._within_memory(run, finishing)

    # --- a whole run ---------------------------------------------------------------------------------

    def _within_memory(self, run: Run, happening: Iterator[Event]) -> Iterator[Event]:
        """What happens; where memory runs out, everything is dropped and the error says what would fit."""
        plan = run.plan
        self._hashes.begin(plan.files)
        if self._models.outdated():
            self.release()
        limit = plan.limits.device if "vram" in plan.limits.given else 0
        try:
            with keep_within(plan.device, max(limit - memory.CONTEXT, 0)):
                yield from happening
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # Its frames hold the tensors that took the memory: only what it said is kept.
            said, details = str(error), getattr(error, "details", {})
        self.release()
        machine = probe_machine(plan.device)
        there = min(machine.memory_free, limit or machine.memory_free)
        here = machine.model_copy(update={"memory_free": there})
        raise out_of_memory(plan, run.stages.now, here, said, details)

    def _make(self, run: Run, going_on: KeptSteps | None = None) -> Iterator[Event]:
        """All seeds; where steps are given to go on from, those from theirs on."""
        plan = run.plan
        if plan.clips:
            for index in range(len(plan.seeds)):
                single = run.of_seed(index)
                yield from self._make_clips(single, KeptClips(single.plan, beside(single.plan, CLIPS_SUFFIX)))
        else:
            conditions = yield from self._encode(run)
            for index in range(going_on.index if going_on else 0, len(plan.seeds)):
                single = run.of_seed(index)
                steps = going_on or KeptSteps(plan, index, beside(single.plan, STEPS_SUFFIX))
                yield from self._make_one(single, conditions, steps)
                going_on = None
        self._texts.keep(plan)
        self._calibrate(run)

    def _make_one(self, run: Run, conditions: Mapping[Branch, Conditions], steps: KeptSteps) -> Iterator[Event]:
        """One seed. Its saved steps stay until all of it is written."""
        left = step_work(run.plan)[steps.done :]
        meter = Meter("sample", len(left), run.plan.seeds[0], left)
        start_BCFhw = noise(run.plan.seeds[0], (1, *run.plan.latent))
        try:
            latents_CFhw = yield from self._sample(run, start_BCFhw, conditions, meter, steps)
        except Exception as error:
            if not steps.hint():
                raise
            raise hinted(error, steps.hint(), steps=str(steps.path)) from error
        yield from self._finish(run, latents_CFhw)
        steps.remove()

    def _make_clips(self, run: Run, kept: KeptClips) -> Iterator[Event]:
        """One video clip by clip. Finished clips stay in `kept` until all of it is written."""
        paths = dict(zip(run.plan.output.kinds, run.plan.output.paths[0], strict=True))
        asked = paths.pop("latents", None)
        try:
            frames = self._clip_frames(run, kept)
            # Hashes are waited for when the first frames are there, not before.
            opening = yield from _events_before(frames)
            run = self._with_origins(run)
            yield from _lora_notes(run.plan)
            yield from write_frames(run, chain(opening, frames), paths)
            if asked is not None:
                write_whole(asked, ops.latents_bytes(torch.cat(kept.latents, dim=1), run.plan))
        except Exception as error:
            if not kept.hint():
                raise
            raise hinted(error, kept.hint(), clips=str(kept.folder)) from error
        kept.remove()
        yield _result(run)

    # --- stages --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _encode(self, run: Run) -> Generator[Event, None, dict[Branch, Conditions]]:
        plan, get = run.plan, partial(self._get, run.plan)
        rows = yield from self._encode_prompts(run)
        run.stop_if_asked()
        counted = encodes(plan)
        meter = Meter("encode images", 1)
        if plan.flux is not None:
            with run.stages.measure("encode text", counted=False):
                pooled = pooled_texts(plan, rows, get)
        # Without images, what is left is small: the motion controller, planned beside the texts.
        with run.stages.measure("encode images" if counted else "encode text", counted):
            if counted:
                yield meter.start()
            if plan.flux is not None:
                told = flux_conditions(plan, rows, pooled, get)
            else:
                given = media_conditions(plan, get)
                told = {branch: replace(given, text=(text,)) for branch, text in rows.items()}
            if counted:
                yield meter.tick()
        return told

    @torch.inference_mode()
    def _encode_prompts(self, run: Run) -> Generator[Event, None, dict[Branch, Tensor]]:
        """Rows of the prompt and, where there is guidance, of the negative prompt."""
        plan = run.plan
        texts = [plan.prompt]
        if any(step.guidance != 1.0 for step in plan.steps):
            texts.append(plan.negative)
        yield (meter := Meter("encode text", 1)).start()
        # Texts that are known already say nothing of the encoder's speed.
        with run.stages.measure("encode text", counted=not self._texts.has(plan, texts)):
            rows = self._texts.encode(plan, texts, partial(self._get, plan))
        yield from self._texts.notes()
        yield meter.tick()
        branches: tuple[Branch, ...] = ("cond", "uncond")
        return dict(zip(branches, rows, strict=False))

    @torch.inference_mode()
    def _sample(
        self,
        run: Run,
        start_BCFhw: Tensor,
        conditions: Mapping[Branch, Conditions],
        meter: Meter,
        kept: KeptSteps,
    ) -> Generator[Event, None, Tensor]:
        """The latents of one seed or clip, from noise; where `kept` holds a step, from that one on."""
        plan, device = run.plan, torch.device(run.plan.device)
        after = kept.after
        steps = plan.steps[after.index + 1 if after else 0 :]
        run.stop_if_asked()
        if plan.experts[steps[0].expert] not in self._models:
            with run.stages.measure("load"):
                yield (loading := Meter("load", 1)).start()
                self._expert(plan, steps[0].expert)
                yield loading.tick()
            run.stop_if_asked()
        together = any(ref.resident_blocks is not None for ref in plan.experts.values())
        bring = partial(self._bring, plan)
        velocity = ops.Velocity(partial(self._expert, plan), conditions, device, together, steps, bring)
        told, start_BCFhw = conditions["cond"], start_BCFhw.to(device)
        if told.source_BCFhw is not None:
            start_BCFhw = noised(told.source_BCFhw.to(device), start_BCFhw, plan.steps[0].sigma)
        factors = ops.preview_factors(plan) if plan.output.preview is not None else None
        with run.stages.measure("sample"):
            yield meter.start()
            try:
                after = after and replace(after, memory=tuple(tensor.to(device) for tensor in after.memory))
                for step in sample(plan.steps, plan.solver, start_BCFhw, velocity, told.clean_BCFhw, after):
                    kept.keep(step)
                    yield meter.tick()
                    run.stop_if_asked()
                    if plan.output.preview is not None:
                        clean_CFhw = ops.of_video(plan, step.x0[0])
                        yield write_preview(plan, plan.output.preview, step.index, clean_CFhw, factors)
            except NumericsError as error:
                raise located(error, velocity.last) from error
        return ops.of_video(plan, step.x[0]).cpu()

    @torch.inference_mode()
    def _finish(self, run: Run, latents_CFhw: Tensor, kept: Path | None = None) -> Iterator[Event]:
        """Decode and write the outputs of one seed; its latents are on disk before, and stay there on failure."""
        run = self._with_origins(run)
        plan = run.plan
        yield from _lora_notes(plan)
        paths = dict(zip(plan.output.kinds, plan.output.paths[0], strict=True))
        asked = paths.pop("latents", None)
        safe = kept or keep_latents(latents_CFhw, plan, asked or beside(plan, ".latents.safetensors"))
        if paths:
            try:
                with run.stages.measure("decode"):
                    frames = ops.decode_frames(cast(ops.VAE, self._get(plan, plan.vae)), latents_CFhw, plan)
                    yield from write_frames(run, frames, paths)
            except Exception as error:
                hint = f"the finished latents are in {safe}; make the video with: kinema decode {safe}"
                raise hinted(error, hint, latents=str(safe)) from error
            if asked is None and kept is None:
                safe.unlink()
        yield _result(run)

    @torch.inference_mode()
    def _clip_frames(self, run: Run, kept: KeptClips) -> Iterator[Event | Tensor]:
        """Yield what happens and the frames of all clips; those finished before are only decoded."""
        plan, seed = run.plan, run.plan.seeds[0]
        rows: dict[Branch, Tensor] = {}
        steps_done = 0
        if len(kept) < len(plan.clips):
            rows = yield from self._encode_prompts(run)
            steps_done = kept.steps().done
        with run.stages.measure("encode inputs"):
            yield (inputs := Meter("encode inputs", 1)).start()
            task = clip_task(plan, partial(self._get, plan), rows, run.stop_if_asked)
            yield inputs.tick()
        left = (step_work(plan) * (len(plan.clips) - len(kept)))[steps_done:]
        meter = Meter("sample", len(left), seed, left)

        def sample_clip(number: int, conditions: Callable[[], Branches]) -> Generator[Event, None, Tensor]:
            run.stop_if_asked()
            if number < len(kept):
                return kept.latents[number]
            with run.stages.measure("encode inputs"):
                told, start_BCFhw = conditions(), task.noise(number, seed)
            latents_CFhw = yield from self._sample(run, start_BCFhw, told, meter, kept.steps())
            kept.add(latents_CFhw)
            return latents_CFhw

        yield from make_clips(plan.clips, task, sample_clip, run.stages.measure)

    # --- models --------------------------------------------------------------------------------------

    def _get(self, plan: Plan, ref: ModelRef) -> nn.Module:
        """The loaded model, with room for what it does in this plan."""
        module = self._models.get(ref, memory.need(plan, ref), memory.usable(plan))
        if isinstance(module, WanVAE):
            module.history_on_host = plan.vae_cache == "cpu"
        return module

    def _expert(self, plan: Plan, expert: Expert) -> ops.DiT:
        return cast(ops.DiT, self._get(plan, plan.experts[expert]))

    def _bring(self, plan: Plan, expert: Expert, following: Expert) -> None:
        """Have the first block of the next expert come in while the last one of this expert computes."""
        if memory.may_follow(plan, following):
            self._models.follow(plan.experts[expert], plan.experts[following])

    # --- small things --------------------------------------------------------------------------------

    def _with_origins(self, run: Run) -> Run:
        """The run whose plan has the hashes of its files, what runs it, and how much each LoRA changed weights."""
        plan = run.plan
        versions = {"kinema": VERSION, "torch": torch.__version__, "python": platform.python_version()}
        update = {"hashes": self._hashes.collect(plan.files), "versions": versions, "loras": self._changed(plan)}
        return replace(run, plan=plan.model_copy(update=update))

    def _changed(self, plan: Plan) -> tuple[LoraPlan, ...]:
        sizes = {expert: list(self._models.changes(ref)) for expert, ref in plan.experts.items()}
        return tuple(
            lora.model_copy(update={"change": found.pop(0)}) if (found := sizes[lora.expert]) else lora
            for lora in plan.loras
        )

    def _calibrate(self, run: Run) -> None:
        if self.settings.cache is not None:
            file = self.settings.cache / "calibration.json"
            record_calibration(file, run.plan.device, work(run.plan), run.stages.mean_seconds())


def _lora_notes(plan: Plan) -> Iterator[Note]:
    return (Note(about="lora", text=lora.said) for lora in plan.loras)


def _result(run: Run) -> Result:
    return Result(seed=run.plan.seeds[0], paths=run.plan.output.paths[0], plan=run.plan, stages=run.stages.reports)


def _events_before(frames: Iterator[Event | Tensor]) -> Generator[Event, None, list[Tensor]]:
    """Pass on what happens until frames come; return those."""
    for item in frames:
        if isinstance(item, Tensor):
            return [item]
        yield item
    return []
