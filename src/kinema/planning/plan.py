"""Request + catalog entry + facts -> Plan: every decision of a run, made before anything is loaded.

Pure Python. All variant logic lives here; what is decided for the user is recorded as a Note, and what
cannot mean anything is refused with the nearest thing that can.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from kinema.errors import RequestError
from kinema.planning.activations import tokens_beside
from kinema.planning.animate import plan_animated
from kinema.planning.camera import plan_camera
from kinema.planning.checks import MEDIA_FIELDS, check_components, check_request
from kinema.planning.cost import estimate
from kinema.planning.flux import flux_images, plan_flux
from kinema.planning.geometry import LATENT_CHANNELS, PATCH, SPATIAL_STRIDE, latent_frames
from kinema.planning.inputs import plan_concat, plan_images, plan_videos
from kinema.planning.lora import ROLES, plan_loras, step_strengths, with_loras, with_preset
from kinema.planning.memory import fit
from kinema.planning.one_frame import plan_one_frame
from kinema.planning.outputs import plan_output
from kinema.planning.quantisation import multiplied, quantised
from kinema.planning.restart import last_steps, plan_strength, starts_from_video
from kinema.planning.shape import plan_length, plan_size, plan_tile
from kinema.planning.speech import (
    note_mute_outputs,
    plan_reference,
    plan_speech,
)
from kinema.sampling.schedule import TRAIN_TIMESTEPS, Schedule, expert_of, flux_shift, schedule
from kinema.schema import (
    AREAS,
    CatalogEntry,
    CatalogLora,
    Dtype,
    Expert,
    Facts,
    FileFacts,
    ImagePlan,
    Machine,
    ModelRef,
    MotionPlan,
    Note,
    Plan,
    PlanStep,
    Precision,
    Request,
)
from kinema.version import VERSION


def make_plan(request: Request, entry: CatalogEntry, facts: Facts) -> Plan:
    """Return the whole run as data.

    Raises RequestError for what the model cannot make, CheckpointError for files that do not belong
    together, MachineError for what cannot fit on this machine. Draws a random seed where none is given;
    apart from that the same arguments give the same plan.
    """
    notes: list[Note] = list(facts.notes)
    check_request(request, entry)
    check_components(request, entry, facts)
    animated = plan_animated(request, entry, facts, notes) if entry.structure.get("animate") else None
    width, height = animated.size if animated else plan_size(request, entry, facts, notes)
    driven = plan_speech(request, entry, facts, notes) if entry.structure.get("speech") else None
    one_frame = plan_one_frame(request, entry, notes)
    frames, fps = animated.length if animated else plan_length(request, entry, facts, notes)
    if driven:
        frames = sum(clip.shown for clip in driven.clips)
    stride = SPATIAL_STRIDE[entry.vae]
    references = len(request.reference) if entry.structure.get("vace") else 0
    beside = len(one_frame.controls) if one_frame else references
    depth = driven.latent_frames if driven else latent_frames(frames) + beside
    latent = (LATENT_CHANNELS[entry.vae], depth, height // stride, width // stride)
    concat = plan_concat(entry, facts)
    precision: Precision = request.precision or "fast"
    exact = partial(_ref, machine=facts.machine, dtype="float32")
    loras = plan_loras(request, entry, facts, notes)
    entry = with_preset(entry, loras.preset)
    follows = driven is not None and (len(driven.clips) > 1 or request.start_from_reference)
    tokens = _tokens(latent, facts.files["dit"], motion=follows)
    shift = _shift(request, entry, width * height, tokens)
    boundary = entry.boundary if request.boundary is None else request.boundary
    strength = plan_strength(request, entry, notes)
    steps = _steps(request, entry, shift, boundary, strength, notes, loras.preset)
    steps = step_strengths(steps, loras, request, notes)
    prompt, negative = _texts(request, entry, steps, notes)
    notes += _unread(entry, facts)
    seeds = _seeds(request)
    output = plan_output(request, facts, seeds, frames, prompt, notes)
    if driven or (animated and animated.sound):
        note_mute_outputs(output.kinds, notes)
    motion = None
    if request.motion_bucket_id is not None:
        motion = MotionPlan(controller=exact(facts.files["motion_controller"]), bucket_id=request.motion_bucket_id)
    plan = Plan(
        kinema=VERSION,
        request=request,
        model=entry.name,
        title=entry.title,
        licence=entry.licence,
        task=_task(request, entry, frames),
        experts=with_loras(_experts(request, entry, facts, precision, notes), loras, request),
        text_encoder=_text_encoder(request, facts, precision, notes),
        vae=exact(facts.files["vae"]),
        clip_vision=_clip(entry, facts, precision),
        loras=loras.reports,
        preset=loras.preset.name if loras.preset else None,
        audio_encoder=exact(facts.files["audio_encoder"]) if driven else None,
        motion=motion,
        prompt=prompt,
        negative=negative,
        text_len=entry.text_len,
        images=_images(request, entry, facts, (width, height), frames, notes),
        videos=plan_videos(request, entry, facts, (width, height), frames, fps, notes),
        first_frame=_first_frame(request, entry, bool(concat)),
        concat=concat,
        control_scale=1.0 if request.control_scale is None else request.control_scale,
        reference_frames=references,
        camera=plan_camera(request.camera, next(iter(facts.media.get("camera", ())), None), frames, fps, notes),
        flux=plan_flux(request, entry, facts, exact) if entry.family == "flux" else None,
        one_frame=one_frame,
        strength=strength,
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        latent=latent,
        tokens=tokens,
        clips=driven.clips if driven else (),
        speech=driven.speech if driven else None,
        sound=driven.sound if driven else None,
        seeds=seeds,
        solver=request.solver or entry.solver,
        shift=shift,
        boundary=boundary,
        steps=steps,
        precision=precision,
        device=facts.machine.device,
        tile=plan_tile(request, stride),
        chunk=request.chunk or 1,
        output=output,
        notes=tuple(notes),
    )
    fitted = fit(animated.applied(plan) if animated else plan, request, facts.machine)
    return fitted.model_copy(update={"costs": estimate(fitted, facts.machine)})


def _tokens(latent: tuple[int, int, int, int], dit: FileFacts, *, motion: bool) -> int:
    """Tokens of the noise, and of what adapters put beside it."""
    _, frames, rows, columns = latent
    return frames * (rows // PATCH) * (columns // PATCH) + tokens_beside(dit.config, rows, columns, motion=motion)


def _task(request: Request, entry: CatalogEntry, frames: int) -> str:
    if entry.structure.get("speech"):
        return "speech to video"
    if entry.family == "flux":
        given = [name for name in ("first", "control", "reference") if getattr(request, name)]
        return "image to image" if given else "text to image"
    given = [name for name in ("first", "last") if getattr(request, name)]
    if request.one_frame:
        return "image edit"
    if starts_from_video(request, entry):
        return "video to video"
    if request.camera:
        return "camera to video"
    if request.control:
        return "control to video"
    if request.video:
        return "inpainting" if request.mask else "outpainting" if request.outpaint else "extension"
    if request.reference:
        return "reference to video"
    if frames == 1:
        return "text to image"
    if request.middle:
        return "given frames to video"
    return {0: "text to video", 1: "image to video", 2: "first and last frame to video"}[len(given)]


def _images(
    request: Request, entry: CatalogEntry, facts: Facts, size: tuple[int, int], frames: int, notes: list[Note]
) -> tuple[ImagePlan, ...]:
    if entry.structure.get("speech"):
        return (plan_reference(facts, size, notes),)
    if entry.family == "flux":
        return flux_images(request, entry, facts, size, notes)
    return plan_images(request, entry, facts, size, frames, notes)


def _first_frame(request: Request, entry: CatalogEntry, concat: bool) -> Literal["none", "concat", "overwrite"]:
    """How frame 0 enters; a model that overwrites it does so only where it is known to its last pixel."""
    whole = request.first or (request.video and not request.mask and not request.outpaint)
    if entry.first_frame == "overwrite" and whole:
        return "overwrite"
    return "concat" if concat else "none"


# --- sampling ------------------------------------------------------------------------------------


def _shift(request: Request, entry: CatalogEntry, area: int, tokens: int) -> float:
    if request.shift is not None:
        return request.shift
    if entry.shift_by_tokens:
        return flux_shift(tokens)
    return entry.shift_480p if entry.shift_480p and area <= AREAS["480p"] else entry.shift


def _steps(
    request: Request,
    entry: CatalogEntry,
    shift: float,
    boundary: float | None,
    strength: float | None,
    notes: list[Note],
    preset: CatalogLora | None = None,
) -> tuple[PlanStep, ...]:
    guidance = _guidance(request, entry, notes)
    grid = schedule(request.solver or entry.solver, request.steps or entry.steps, shift)
    if preset and preset.sigmas and request.steps in (None, preset.steps) and request.shift is None:
        grid = Schedule((*preset.sigmas, 0.0), tuple(sigma * TRAIN_TIMESTEPS for sigma in preset.sigmas))
    steps = []
    # FLUX was never shown whole timesteps, whichever solver asks.
    exact = entry.family == "flux"
    timesteps = [TRAIN_TIMESTEPS * sigma for sigma in grid.sigmas[:-1]] if exact else grid.timesteps
    for sigma, timestep in zip(grid.sigmas, timesteps, strict=False):
        expert: Expert = "model" if boundary is None else expert_of(timestep, boundary)
        steps.append(PlanStep(sigma=sigma, timestep=timestep, expert=expert, guidance=guidance[expert]))
    if strength is not None:
        steps = last_steps(steps, strength, notes)
    for expert in entry.experts:
        if all(step.expert != expert for step in steps):
            notes.append(Note(about="boundary", text=f"the {expert}-noise expert runs no step at boundary {boundary}"))
    return tuple(steps)


def _guidance(request: Request, entry: CatalogEntry, notes: list[Note]) -> dict[str, float]:
    if entry.family == "flux":
        return {"model": 1.0 if request.true_guidance is None else request.true_guidance}
    low = request.guidance if request.guidance is not None else entry.guidance
    if "high" not in entry.experts:
        return {"model": low}
    high = request.guidance_high
    if high is None and request.guidance is not None:
        high = request.guidance
        notes.append(
            Note(about="guidance", text=f"{high:g} for both experts; --guidance-high sets the high-noise one apart")
        )
    if high is None:
        high = entry.guidance_high if entry.guidance_high is not None else entry.guidance
    return {"low": low, "high": high}


def _texts(request: Request, entry: CatalogEntry, steps: Sequence[PlanStep], notes: list[Note]) -> tuple[str, str]:
    prompt = (request.prompt or entry.prompt).strip()
    if entry.prompt:
        own = f"{entry.name} was made with one prompt alone, {entry.prompt}"
        notes.append(Note(about="prompt", text=f"{own}: another may weaken it" if request.prompt else own))
    if not prompt and not any(getattr(request, field) for field in MEDIA_FIELDS):
        raise RequestError(
            f"no prompt: {entry.name} has nothing to show",
            'pass a text, for example: kinema generate "a cat walks on grass"',
            field="prompt",
            got=request.prompt,
        )
    if not prompt:
        notes.append(Note(about="prompt", text="no prompt: the motion is the model's own choice"))
    negative = request.negative if request.negative is not None else entry.negative
    if request.negative and all(step.guidance == 1 for step in steps):
        notes.append(Note(about="negative", text="the negative prompt has no effect at guidance 1"))
    return prompt, negative


def _unread(entry: CatalogEntry, facts: Facts) -> Iterator[Note]:
    """Yield what is said of texts that are longer than an encoder reads."""
    for field, count in facts.cut.items():
        yield Note(about=field, text=f"its last {count} tokens are left out: {entry.name} reads {entry.text_len}")
    for field, count in facts.cut_by_clip.items():
        length = facts.files["clip_text"].config["num_positions"]
        text = f"CLIP does not see its last {count} tokens: it reads {length}, T5 {entry.text_len}"
        yield Note(about=field, text=text)


def _seeds(request: Request) -> tuple[int, ...]:
    if request.seeds and (request.seed is not None or request.count > 1):
        raise RequestError(
            f"seeds {','.join(map(str, request.seeds))} already says which and how many; "
            f"{'seed' if request.seed is not None else 'count'} cannot be given as well",
            "leave out --seed and --count, or --seeds",
            field="seeds",
            got=list(request.seeds),
        )
    for seed in request.seeds:
        if not 0 <= seed < 2**63:
            raise RequestError(
                f"seed {seed} is out of range; allowed are 0 to {2**63 - 1}",
                "pass another seed",
                field="seeds",
                got=seed,
            )
    if twice := sorted({seed for seed in request.seeds if request.seeds.count(seed) > 1}):
        raise RequestError(
            f"seeds name {twice[0]} twice, which would make the same video again",
            "name each seed once",
            field="seeds",
            got=list(request.seeds),
        )
    first = request.seed if request.seed is not None else secrets.randbelow(2**32)
    if first + request.count > 2**63:
        raise RequestError(
            f"seed {first} and count {request.count} go beyond the last seed, {2**63 - 1}",
            f"pass --seed {2**63 - request.count} or less",
            field="seed",
            got=first,
        )
    return request.seeds or tuple(range(first, first + request.count))


# --- how it is held ------------------------------------------------------------------------------


def _dtype(precision: Precision, machine: Machine) -> Dtype:
    return "bfloat16" if precision == "fast" and machine.bfloat16 else "float32"


def _experts(
    request: Request, entry: CatalogEntry, facts: Facts, precision: Precision, notes: list[Note]
) -> dict[Expert, ModelRef]:
    dtype = request.dtype or _dtype(precision, facts.machine)
    config = {"text_len": entry.text_len} if entry.family == "wan" else {}
    refs = {}
    for expert in entry.experts:
        file = facts.files[ROLES[expert]]
        ref = _ref(file, facts.machine, dtype, config=config)
        refs[expert] = quantised(ref, file, request.quantise, "quantise", notes)
    return multiplied(refs, request, facts.machine, notes)


def _text_encoder(request: Request, facts: Facts, precision: Precision, notes: list[Note]) -> ModelRef:
    file = facts.files["text_encoder"]
    ref = _ref(file, facts.machine, _dtype(precision, facts.machine), facts)
    return quantised(ref, file, request.quantise_text_encoder, "quantise_text_encoder", notes)


def _clip(entry: CatalogEntry, facts: Facts, precision: Precision) -> ModelRef | None:
    if not entry.structure.get("has_clip_tokens"):
        return None
    on_gpu = facts.machine.device != "cpu" and precision == "fast"
    return _ref(facts.files["clip_vision"], facts.machine, "float16" if on_gpu else "float32")


def _ref(
    file: FileFacts,
    machine: Machine,
    dtype: Dtype,
    facts: Facts | None = None,
    config: Mapping[str, Any] | None = None,
) -> ModelRef:
    return ModelRef(
        component=file.component,
        files=file.files,
        dialect=file.dialect,
        container=file.container,
        config={**file.config, **(config or {})},
        dtype=dtype,
        device=machine.device,
        bytes=file.bytes,
        parameters=file.parameters,
        quantisation=file.quantisation,
        packed_parameters=file.packed_parameters,
        packed_bytes=file.packed_bytes,
        matrix_parameters=file.matrix_parameters,
        stored=file.dtype,
        blocks=file.blocks,
        float32_parameters=file.float32_parameters if dtype != "float32" else 0,
        tokenizer=facts.tokenizer if facts else None,
    )
