"""How a run fits a machine: what each stage takes, and the settings, dearest last, that keep it within the limits.

Pure arithmetic over a plan. make_plan uses `fit`, so planning with facts of files that are not here yet (sizes and
structure from a catalog) answers what would fit a card. The engine keeps to the same rule of what stays loaded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, get_args

from kinema.errors import MachineError, RequestError
from kinema.planning import activations, flux_cost
from kinema.planning.flux import rows_beside
from kinema.planning.flux_cost import is_flux
from kinema.planning.geometry import SPEECH_MULTIPLE, TEMPORAL_STRIDE
from kinema.planning.inputs import encoded_latent_frames, encodes
from kinema.planning.quantisation import multiplied, rounded, unpacking_bytes
from kinema.schema import Expert, Limits, Machine, ModelRef, Note, Plan, Quantise, Request, StageCost, flag

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_BASE = 400_000_000  # Python, torch and its libraries
HOST_BASE = 2_000_000_000  # the same beside a GPU, whose libraries take more
CONTEXT = 600_000_000  # of a GPU, before the first tensor
USABLE = 0.95  # of what is left: caching allocators leave gaps
CPU_LIBRARIES = 15_000_000  # what they keep once used: code made for this CPU, holes between small blocks
CPU_WORKSPACE = 1.04  # what they take inside an operation beside its tensors; both measured, see docs/log.md
CLIP_TOKENS = 257  # of one image
WAITING_CHUNKS = 3  # of frames: two in the queue before a file's writer, and the one it writes
TEXT_ENCODERS = ("text_encoder", "t5")
ROUNDED_ON_LOAD = get_args(Quantise)
FREED = ("blocks_to_swap", "text_encoder_on", "ffn_tokens", "vae_cache", "tile")
"""Request fields by which a user decides what the plan would choose otherwise."""

FIELDS = ("vram", "ram", "dtype", "quantise", "quantise_text_encoder", *FREED, "chunk")
"""All by which a user decides how memory is used."""

ROUNDED = (("quantise",), ("quantise_text_encoder",), ("quantise", "quantise_text_encoder"))
"""Request fields by which weights of 16 bits and more take half the room: the fewest first."""


# --- one model -------------------------------------------------------------------------------------


def block_parameters(ref: ModelRef) -> tuple[int, ...]:
    """Return parameters of each block; by the formula of its kind where no header has been read."""
    config = ref.config
    if ref.blocks or "num_layers" not in config:
        return ref.blocks
    d = config["dim"]
    if ref.component == "dit":
        return (int(8 * d * d + 2 * d * config["ffn_dim"] + 20 * d),) * int(config["num_layers"])
    if ref.component in TEXT_ENCODERS:
        return (int(4 * d * config["dim_attn"] + 3 * d * config["ffn_dim"]),) * int(config["num_layers"])
    return ()


def held_bytes(ref: ModelRef) -> int:
    """Return bytes of its own that a loaded model takes where it is; tensors left in the mapped file are none."""
    each = _bytes_each(ref)
    blocks = block_parameters(ref)
    float32 = min(ref.float32_parameters, ref.parameters)
    edges = (ref.parameters - sum(blocks) - float32) * each + float32 * 4
    mapped = _stays_mapped(ref)
    if mapped:
        edges = float32 * (0 if ref.stored == "float32" else 4)
    if ref.resident_blocks is None:
        return round(edges + (0 if mapped else sum(blocks) * each) + ref.lora_bytes)
    if ref.component in TEXT_ENCODERS:
        edges = 0  # its table stays on the host, as its file stores it
    staying = 0 if mapped else ref.resident_blocks * sum(blocks) / max(len(blocks), 1)
    slots = min(2, len(blocks) - ref.resident_blocks) and 2
    there = (ref.resident_blocks + slots) / max(len(blocks), 1)
    return round(edges + staying * each + slots * max(blocks, default=0) * each + there * ref.lora_bytes)


def ring_bytes(ref: ModelRef) -> int:
    """Return bytes of host memory, beside a GPU, through which blocks are streamed."""
    streams = ref.resident_blocks is not None and ref.device != "cpu"
    return round(2 * max(block_parameters(ref), default=0) * _bytes_each(ref)) if streams else 0


def mapped_bytes(ref: ModelRef) -> int:
    """Return bytes of files that are used in place, or read again and again: page cache, which the system lends."""
    return ref.bytes if _stays_mapped(ref) or ref.resident_blocks is not None else 0


def _bytes_each(ref: ModelRef) -> float:
    return ref.weight_bytes / max(ref.parameters, 1)


def _stays_mapped(ref: ModelRef) -> bool:
    return ref.device == "cpu" and not _changed(ref) and bool(ref.quantisation or ref.stored == ref.dtype)


def _changed(ref: ModelRef) -> bool:
    return ref.quantisation in ROUNDED_ON_LOAD or bool(ref.loras and ref.lora_mode == "fuse")


def may_follow(plan: Plan, expert: Expert) -> bool:
    """Whether the next expert may be at hand while the one before it works: its blocks are streamed, and the host
    has room for what both hold there. What is changed when it is loaded is held on the host as a whole.
    """
    if plan.experts[expert].resident_blocks is None:
        return False
    changed = [ref.weight_bytes for ref in plan.experts.values() if _changed(ref)]
    return not changed or not plan.limits.host or HOST_BASE + sum(changed) <= plan.limits.host


def leaving(loaded: Sequence[ModelRef], used: Sequence[ModelRef], need: float, limit: float) -> list[ModelRef]:
    """Return which loaded models, least recently used first, have to leave before a stage that uses `used`.

    need   bytes of its activations; limit: bytes there are for all. A limit of 0 is none.
    """
    left: list[ModelRef] = []
    others = [ref for ref in loaded if ref not in used]
    taken = need + sum(map(held_bytes, {*loaded, *used}))
    for ref in others:
        if not limit or taken <= limit:
            break
        taken -= held_bytes(ref)
        left.append(ref)
    return left


# --- stages ----------------------------------------------------------------------------------------


def stages(plan: Plan) -> dict[str, list[tuple[ModelRef, float]]]:
    """Return for each stage, in order, the models it runs one after the other, and bytes of activations of each."""
    found = {"encode text": [(plan.text_encoder, _text(plan))]}
    seeing = [(plan.clip_vision, activations.clip_bytes(plan.clip_vision.config))] if plan.clip_vision else []
    if plan.flux is not None:
        found["encode text"].append((plan.flux.clip_text, 0.0))
        seeing = [(ref, 0.0) for ref in (plan.flux.siglip, plan.flux.redux) if ref]
    if plan.motion is not None:
        found["encode text"].append((plan.motion.controller, 0.0))
    if encodes(plan):
        found["encode images"] = [*seeing, (plan.vae, _vae(plan, decoder=False))]
    if plan.clips:  # encoded clip by clip
        found["encode inputs"] = found.pop("encode images", [])
    if plan.audio_encoder and plan.sound:
        hearing = (plan.audio_encoder, activations.hearing_bytes(plan.audio_encoder.config, plan.sound.seconds))
        found["encode inputs"].insert(0, hearing)
    order = list(dict.fromkeys(step.expert for step in plan.steps))
    found["load"] = [(plan.experts[order[0]], 0.0)]
    found["sample"] = [(plan.experts[expert], _dit(plan, plan.experts[expert])) for expert in order]
    found["decode"] = [(plan.vae, _vae(plan, decoder=True))]
    return found


def need(plan: Plan, ref: ModelRef) -> float:
    """Return the most bytes of activations a model takes in a plan; 0 for one whose are not worth counting."""
    return max((bytes for uses in stages(plan).values() for used, bytes in uses if used == ref), default=0)


def costs(plan: Plan) -> tuple[StageCost, ...]:
    """Return memory of each stage of a fresh engine; seconds are left out."""
    loaded: list[ModelRef] = []
    found = []
    for stage, uses in stages(plan).items():
        peak = host = 0.0
        for ref, need in uses:
            gone = leaving(loaded, [ref], need, usable(plan))
            loaded = [other for other in loaded if other not in gone and other != ref] + [ref]
            here = [other for other in loaded if (other.device == "cpu") == (plan.device == "cpu")]
            at_work = need if ref.device == plan.device else 0
            peak = max(peak, sum(map(held_bytes, here)) + at_work)
            host = max(host, _host(plan, loaded, ref, need))
        found.append(
            StageCost(
                stage=stage,
                peak_bytes=round(peak + (CPU_BASE + CPU_LIBRARIES if plan.device == "cpu" else 0)),
                host_bytes=round(host) if plan.device != "cpu" else 0,
                mapped_bytes=sum(mapped_bytes(ref) for ref, _ in uses),
            )
        )
    return tuple(found)


def usable(plan: Plan) -> float:
    """Return bytes that weights and activations may take together; 0 where that is unknown."""
    if not plan.limits.device:
        return 0
    if plan.device == "cpu":
        return max(plan.limits.device - CPU_BASE, 1)
    return max((plan.limits.device - CONTEXT) * USABLE, 1)


def _host(plan: Plan, loaded: Sequence[ModelRef], ref: ModelRef, need: float) -> float:
    """Bytes of host memory beside a GPU: the ring, what runs on the host, what the VAE keeps there."""
    on_host = sum(held_bytes(other) for other in loaded if other.device == "cpu")
    # What is changed when it is loaded is no longer in its file, and is streamed from host memory.
    on_host += sum(other.weight_bytes for other in loaded if other.resident_blocks is not None and _changed(other))
    history = 0.0
    if ref.component == "vae" and (plan.vae_cache == "cpu" or plan.tile):
        history = max(
            activations.vae_history_bytes(ref.config, *plan.latent[2:], BYTES[ref.dtype], decoder=decoder)
            for decoder in (False, True)
        )
    pictures = max(_pictures(plan, decoder=decoder) for decoder in (False, True)) if ref == plan.vae else 0.0
    rings = max((ring_bytes(other) for other in loaded), default=0)
    return HOST_BASE + on_host + (need if ref.device == "cpu" else 0) + rings + history + pictures


def _pictures(plan: Plan, *, decoder: bool) -> float:
    """Bytes of frames on the host while the VAE works: 12 a pixel, 4 a pixel of a mask. See conditioning and clips."""
    area = plan.height * plan.width
    clip = plan.clips[0].frames if plan.clips else 0
    if decoder:
        made = clip + (plan.speech.history_frames if plan.speech else 0) if len(plan.clips) > 1 else 0
        return 12.0 * area * (made + WAITING_CHUNKS * min(4 * plan.chunk, plan.frames))
    if plan.speech is not None:
        before = plan.speech.history_frames
        return 12.0 * area * (before + max(before, 2 * clip if plan.speech.pose else 0))
    if plan.animate is not None:
        faces = next(12.0 * video.width * video.height for video in plan.videos if video.role == "face")
        return clip * (area * (24.0 + 16.0 * plan.animate.replaces) + faces)
    roles = {video.role for video in plan.videos}
    vace = any(ref.config.get("vace") for ref in plan.experts.values())
    each = 16.0 * bool(vace or plan.concat) + 24.0 * vace + 12.0 * bool({"control", "source"} & roles and not vace)
    return area * plan.frames * each


def _workspace(plan: Plan) -> float:
    return CPU_WORKSPACE if plan.device == "cpu" else 1.0


def _text(plan: Plan) -> float:
    config = plan.text_encoder.config
    rows = max(_rows(plan, plan.prompt), _rows(plan, plan.negative))
    taken = activations.text_bytes(config, rows) if "num_heads" in config else 0.0
    return taken + unpacking_bytes(plan.text_encoder, rows)


def _rows(plan: Plan, text: str) -> int:
    """An upper bound of the rows kept of a text, whose tokens take two bytes or more."""
    padded = plan.text_encoder.component == "t5"
    return plan.text_len if padded else min(plan.text_len, len(text.encode()) // 2 + 12)


def _vae(plan: Plan, *, decoder: bool) -> float:
    _, _, rows, columns = plan.latent
    tile = plan.tile // (plan.height // rows) if plan.tile else None
    if is_flux(plan.vae.config):
        size = BYTES[plan.vae.dtype]
        taken = flux_cost.autoencoder_bytes(plan.vae.config, rows, columns, size, decoder=decoder, tile=tile)
        return taken * _workspace(plan)
    elsewhere = plan.vae_cache == "cpu" and plan.device != "cpu"
    frames = plan.latent[1] - plan.reference_frames if decoder else encoded_latent_frames(plan)
    taken = activations.vae_bytes(
        plan.vae.config, rows, columns, BYTES[plan.vae.dtype],
        decoder=decoder, chunk=plan.chunk, tile=tile, history_elsewhere=elsewhere,
        still=frames <= 1 and not plan.clips,
    )  # fmt: skip
    return taken * _workspace(plan) + (_pictures(plan, decoder=decoder) if plan.device == "cpu" else 0)


def _dit(plan: Plan, ref: ModelRef) -> float:
    branches = 2 if any(step.guidance != 1.0 for step in plan.steps) else 1
    together = branches if ref.resident_blocks is not None else 1
    if is_flux(ref.config):
        beside = rows_beside(plan)
        taken = flux_cost.transformer_bytes(ref.config, plan.tokens, beside, BYTES[ref.dtype], branches=together)
        return taken * _workspace(plan) + unpacking_bytes(ref, plan.tokens + beside)
    seen = max(1, sum(image.clip for image in plan.images)) if plan.clip_vision else 0
    rows = _rows(plan, plan.prompt) + (_rows(plan, plan.negative) if branches == 2 else 0)
    taken = activations.dit_bytes(
        ref.config, plan.tokens, rows + seen * CLIP_TOKENS, BYTES[ref.dtype],
        branches=together, ffn_tokens=ref.ffn_tokens,
        timesteps=2 if plan.first_frame == "overwrite" or ref.config.get("speech") else 1,
    )  # fmt: skip
    posed = plan.speech is None or plan.speech.pose is not None
    taken += activations.adapter_bytes(ref.config, plan.tokens, BYTES[ref.dtype]) * posed
    if ref.config.get("animate"):  # faces are read before the first step
        taken = max(taken, activations.face_bytes(ref.config["animate"], plan.clips[0].frames))
    return taken * _workspace(plan) + unpacking_bytes(ref, ref.ffn_tokens or plan.tokens)


# --- choosing --------------------------------------------------------------------------------------


def fit(plan: Plan, request: Request, machine: Machine) -> Plan:
    """Return the plan with limits, the settings that keep within them, and costs.

    What the user decided stays as it is. Settings that change no number are taken before those that do.
    Raises MachineError with the nearest settings that fit, RequestError for a setting that cannot be.
    """
    given = tuple(field for field in FIELDS if getattr(request, field) is not None)
    plan = plan.model_copy(update={"limits": _limits(request, machine, given)})
    plan = _as_asked(plan, request)
    fitted = _fitted(plan, request)
    if shortfall(fitted):
        raise _refusal(fitted, plan, request, machine)
    notes = _notes(fitted, request, machine)
    return fitted.model_copy(update={"notes": (*fitted.notes, *notes)})


def shortfall(plan: Plan) -> StageCost | None:
    """Return the stage that goes farthest beyond the limits, None where none does."""
    over = [(_excess(plan, cost), cost) for cost in costs(plan)]
    worst = max(over, key=lambda pair: pair[0])
    return worst[1] if worst[0] > 0 else None


def _excess(plan: Plan, cost: StageCost) -> float:
    base = CPU_BASE if plan.device == "cpu" else 0
    device = cost.peak_bytes - base - usable(plan) if plan.limits.device else 0
    host = cost.host_bytes - plan.limits.host if plan.limits.host else 0
    return max(device, host)


def _limits(request: Request, machine: Machine, given: tuple[str, ...]) -> Limits:
    if machine.device == "cpu":
        if request.vram is not None:
            raise RequestError(
                f"vram {request.vram / 1e9:g} GB is memory of a card, and this runs on the CPU",
                f"pass --ram {request.vram / 1e9:g}GB",
                field="vram",
                got=request.vram,
            )
        bytes_here = request.ram or machine.memory_free
        return Limits(device=bytes_here, host=bytes_here, given=given)
    return Limits(device=request.vram or machine.memory_free, host=request.ram or machine.ram_free, given=given)


def _as_asked(plan: Plan, request: Request) -> Plan:
    """The plan with what the user decided, checked."""
    update: dict[str, Any] = {"vae_cache": request.vae_cache or "device"}
    if request.vae_cache == "cpu" and plan.device == "cpu":
        raise RequestError(
            "vae_cache cpu moves what the VAE remembers from a card to the host, and this runs on the CPU",
            "leave --vae-cache out; --tile lowers the memory of the VAE",
            field="vae_cache",
            got="cpu",
        )
    experts = dict(plan.experts)
    for name, ref in experts.items():
        count = len(block_parameters(ref))
        if request.blocks_to_swap is not None and request.blocks_to_swap > count:
            raise RequestError(
                f"blocks_to_swap {request.blocks_to_swap}: the DiT has {count} blocks",
                f"pass --blocks-to-swap 0 to {count}",
                field="blocks_to_swap",
                got=request.blocks_to_swap,
                allowed=list(range(count + 1)),
            )
        swap = request.blocks_to_swap
        experts[name] = ref.model_copy(
            update={"resident_blocks": count - swap if swap else None, "ffn_tokens": request.ffn_tokens}
        )
    place = request.text_encoder_on
    encoder = plan.text_encoder.model_copy(
        update={
            "device": "cpu" if place == "cpu" else plan.device,
            "resident_blocks": 0 if place == "streamed" and block_parameters(plan.text_encoder) else None,
        }
    )
    return plan.model_copy(update={**update, "experts": experts, "text_encoder": encoder})


def _fitted(plan: Plan, request: Request) -> Plan:
    """Stage by stage the first variant that fits, or the leanest there is; with costs."""
    for stage, variants in (("encode text", _texts), ("sample", _samplers), ("decode", _decoders)):
        for variant in variants(plan, request):
            plan = variant
            if not plan.limits.device or _fits(plan, stage):
                break
    return plan.model_copy(update={"costs": costs(plan)})


def _fits(plan: Plan, stage: str) -> bool:
    checked = (stage, "encode images", "encode inputs") if stage == "decode" else (stage,)
    return all(_excess(plan, cost) <= 0 for cost in costs(plan) if cost.stage in checked)


def _texts(plan: Plan, request: Request) -> Iterator[Plan]:
    yield plan
    if request.text_encoder_on is None and block_parameters(plan.text_encoder):
        encoder = plan.text_encoder.model_copy(update={"resident_blocks": 0})
        yield plan.model_copy(update={"text_encoder": encoder})


def _samplers(plan: Plan, request: Request) -> Iterator[Plan]:
    """Whole, then with the feed-forward in parts, then with as many blocks resident as fit."""
    yield plan
    some = next(iter(plan.experts.values()))
    if request.ffn_tokens is None and "ffn_dim" in some.config:
        pieces = activations.ffn_pieces(some.config, BYTES[some.dtype])
        plan = _each_expert(plan, ffn_tokens=-(-plan.tokens // pieces))
        yield plan
    if request.blocks_to_swap is None and block_parameters(some) and not _stays_mapped(some):
        counts = range(len(block_parameters(some)))  # what fits with some of them resident, fits with fewer
        full = bisect_left(counts, True, key=lambda n: not _fits(_each_expert(plan, resident_blocks=n), "sample"))
        yield _each_expert(plan, resident_blocks=max(full - 1, 0))


def _each_expert(plan: Plan, **update: Any) -> Plan:
    experts = {name: ref.model_copy(update=update) for name, ref in plan.experts.items()}
    return plan.model_copy(update={"experts": experts})


def _decoders(plan: Plan, request: Request) -> Iterator[Plan]:
    """Whole frames; with what the VAE remembers on the host; in tiles, the largest first."""
    yield plan
    remembers = not is_flux(plan.vae.config)
    if remembers and request.vae_cache is None and plan.device != "cpu":
        plan = plan.model_copy(update={"vae_cache": "cpu"})
        yield plan
    if request.tile is None:
        stride = plan.height // plan.latent[2]
        largest = max(plan.latent[2:])
        for cells in range(largest - largest % 2, activations.SMALLEST_TILE - 1, -2):
            yield plan.model_copy(update={"tile": cells * stride})


def _notes(plan: Plan, request: Request, machine: Machine) -> list[Note]:
    notes = []
    for field, there in (("vram", machine.memory_total), ("ram", machine.ram_total)):
        asked = getattr(request, field)
        if asked and there and asked > there:
            text = (
                f"{flag(field)} {asked / 1e9:.1f} GB is more than the {there / 1e9:.1f} GB here: a plan for elsewhere"
            )
            notes.append(Note(about=field, text=text))
    if plan.tile and request.tile is None:
        text = f"whole frames do not fit: decoded in tiles of {plan.tile} pixels, which changes them a little at seams"
        notes.append(Note(about="tile", text=text))
    return notes


# --- refusing --------------------------------------------------------------------------------------


def _refusal(fitted: Plan, plan: Plan, request: Request, machine: Machine) -> MachineError:
    cost = shortfall(fitted)
    assert cost is not None
    host = bool(plan.limits.host) and cost.host_bytes > plan.limits.host
    need, have = (cost.host_bytes, plan.limits.host) if host else (device_need(fitted, cost), plan.limits.device)
    field = "ram" if host or plan.device == "cpu" else "vram"
    fits = nearest(plan, request, machine)
    allowed = getattr(request, field) is not None
    where = f"{flag(field)} allows" if allowed else f"{'the host' if host else machine.name or machine.device} has"
    hints = [f"pass {words}" if words.startswith("--") else words for words in fits]
    return MachineError(
        f"{cost.stage} needs about {need / 1e9:.1f} GB at the least; {where} {have / 1e9:.1f} GB",
        ", or ".join(hints) or "no smaller video fits either: take a smaller model, or another machine",
        need=need,
        have=have,
        fits=fits,
        stage=cost.stage,
    )


def device_need(plan: Plan, cost: StageCost) -> int:
    """Return the limit under which a stage would fit."""
    return cost.peak_bytes if plan.device == "cpu" else round(cost.peak_bytes / USABLE + CONTEXT)


def nearest(plan: Plan, request: Request, machine: Machine) -> list[str]:
    """Return what to type instead, each way really computed: without own settings, with rounded weights, fewer
    frames, a smaller size.
    """
    found = []
    own = [field for field in FREED if field in plan.limits.given]
    if own:
        freed = request.model_copy(update=dict.fromkeys(own))
        bare = plan.model_copy(update={"tile": None, "vae_cache": "device"})
        if not shortfall(_fitted(_as_asked(bare, freed), freed)):
            found.append(f"leave out {', '.join(map(flag, own))}: what the plan chooses fits")
    if request.precision != "reference":  # in which nothing is rounded
        found += _rounding(plan, request, machine)
    fewer = range(plan.frames - 4, 0, -4) if not plan.clips else range(0)  # a clip has the length its model has
    frames = _largest(fewer, lambda n: resized(plan, n, plan.width, plan.height), request)
    if frames is not None:
        found.append(f"--frames {frames}")
    step = SPEECH_MULTIPLE if plan.speech else 2 * (plan.height // plan.latent[2])
    sides = range(plan.width - step, step - 1, -step)
    width = _largest(sides, lambda w: resized(plan, plan.frames, w, _beside(plan, w, step)), request)
    if width is not None:
        found.append(f"--size {width}x{_beside(plan, width, step)}")
    return found


def _rounding(plan: Plan, request: Request, machine: Machine) -> list[str]:
    """The least that has to be rounded, if it is enough; int8 where fp8 numbers, multiplied as they are, take more."""
    held = {"quantise": list(plan.experts.values()), "quantise_text_encoder": [plan.text_encoder]}
    plain = [fields for fields in ROUNDED if not any(ref.quantisation for field in fields for ref in held[field])]
    ways: tuple[Quantise, ...] = ("fp8", "int8")
    for fields, how in product(plain, ways):
        update: dict[str, Any] = {}
        if "quantise" in fields:
            refs = {expert: rounded(ref, how) for expert, ref in plan.experts.items()}
            update["experts"] = multiplied(refs, request, machine, [])
        if "quantise_text_encoder" in fields:
            update["text_encoder"] = rounded(plan.text_encoder, how)
        if not shortfall(_fitted(plan.model_copy(update=update), request)):
            return [" ".join(f"{flag(field)} {how}" for field in fields)]
    return []


def _beside(plan: Plan, width: int, step: int) -> int:
    return max(step, round(plan.height * width / plan.width / step) * step)


def _largest(values: Sequence[int], variant: Callable[[int], Plan], request: Request) -> int | None:
    """The first of falling values whose variant fits: what fits, fits when smaller, so it is sought by halving."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        if shortfall(_fitted(variant(values[middle]), request)):
            low = middle + 1
        else:
            high = middle
    return values[low] if low < len(values) else None


def resized(plan: Plan, frames: int, width: int, height: int) -> Plan:
    """Return the plan for another shape, as far as memory is concerned."""
    stride = plan.height // plan.latent[2]
    depth = plan.latent[1] + (frames - plan.frames) // TEMPORAL_STRIDE
    latent = (plan.latent[0], depth, height // stride, width // stride)
    area = latent[2] * latent[3] / (plan.latent[2] * plan.latent[3])
    per_frame = plan.latent[2] * plan.latent[3] // 4
    beside = plan.tokens - plan.latent[1] * per_frame  # of adapters
    tokens = round(area * (beside + latent[1] * per_frame))
    shape = {"frames": frames, "width": width, "height": height, "latent": latent, "tokens": tokens}
    return plan.model_copy(update=shape)


def smaller(plan: Plan, stage: str, machine: Machine) -> list[str]:
    """Return what to type where `stage` ran out of memory though the plan fitted: a limit that leaves room, or less.

    machine   as it is once everything is dropped.
    """
    field, free = "ram" if plan.device == "cpu" else "vram", machine.memory_free
    reached = next((device_need(plan, cost) for cost in costs(plan) if cost.stage == stage), free)
    limit = int(min(free or reached, 0.85 * reached))
    own = [name for name in FREED if name in plan.limits.given]
    request = plan.request.model_copy(update=dict.fromkeys(own))
    tight = plan.limits.model_copy(update={"device": limit, "given": ()})
    tight_plan = _as_asked(plan.model_copy(update={"limits": tight, "tile": None}), request)
    within = f"{flag(field)} {limit / 1e9:.2f}GB" + (f" without {', '.join(map(flag, own))}" if own else "")
    if not shortfall(_fitted(tight_plan, request)):
        return [within]
    return [f"{words} {within}" for words in nearest(tight_plan, request, machine)]
