"""What a plan will take: floating-point operations, bytes and seconds of each stage, before anything is loaded.

Pure arithmetic over the configurations in a plan; a multiply-add counts as 2. Knows nothing of tensors:
the formulas follow the models' layers, and tests/unit/test_cost.py counts those layers' real operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

from kinema.planning import flux_cost
from kinema.planning.flux_cost import is_flux
from kinema.schema import Machine, ModelRef, Plan, StageCost, calibration_key

Config = Mapping[str, Any]

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
RESIDENT_SHARE = 0.9  # of the free memory: what may stay loaded from earlier stages
FIXED_BYTES = 500_000_000  # Python, torch and its libraries
WORKSPACE = 1.5  # what convolution libraries add to their tensors; measured on a CPU, 1.3 to 1.8
FARTHEST_DECADE = 2  # a rate measured on work of another size, by this factor of ten, predicts nothing


def estimate(plan: Plan, machine: Machine) -> tuple[StageCost, ...]:
    """Return peak memory of each stage, and its seconds where this machine has done the like before.

    Peaks are bytes on the device, models of earlier stages included where they fit beside.
    """
    amounts = work(plan)
    costs = []
    loaded: list[ModelRef] = []
    for stage, refs in _models(plan).items():
        activations = _activations(plan, stage)
        own = max(_weights(ref) for ref in refs)
        peak = own + activations + (FIXED_BYTES if plan.device == "cpu" else 0)
        for ref in reversed([*loaded, *refs]):
            size = _weights(ref)
            if ref != max(refs, key=_weights) and peak + size <= RESIDENT_SHARE * machine.memory_free:
                peak += size
        loaded += [ref for ref in refs if ref not in loaded]
        seconds = predict_seconds(amounts[stage], machine.calibration, stage)
        costs.append(StageCost(stage=stage, peak_bytes=round(peak), seconds=seconds))
    return tuple(costs)


def work(plan: Plan) -> dict[str, float]:
    """Return the work of each stage for one seed: FLOPs, of "load" bytes. Stages the plan lacks are left out."""
    texts = [plan.prompt, *([plan.negative] if _branches(plan) > 1 else [])]
    tokens = [min(len(text.encode()) / 4 + 2, plan.text_len) for text in texts]  # about 4 bytes a token
    _, frames, height, width = plan.latent
    amounts = {"encode text": sum(text_encoder_flops(plan.text_encoder.config, count) for count in tokens)}
    if plan.images:
        latent_frames = frames if plan.first_frame == "concat" else 1
        amounts["encode images"] = vae_encode_flops(plan.vae.config, latent_frames, height, width)
        if plan.clip_vision is not None:
            amounts["encode images"] += len(plan.images) * clip_flops(plan.clip_vision.config)
    amounts["load"] = float(_weights(plan.experts[plan.steps[0].expert]))
    clip_tokens = len(plan.images) * clip_tokens_of(plan.clip_vision.config) if plan.clip_vision else 0
    dit = {
        expert: dit_flops(ref.config, frames, height, width, plan.text_len, clip_tokens)
        for expert, ref in plan.experts.items()
    }
    amounts["sample"] = sum(dit[step.expert] * (1 if step.guidance == 1.0 else 2) for step in plan.steps)
    amounts["decode"] = vae_decode_flops(plan.vae.config, frames, height, width)
    return amounts


def predict_seconds(amount: float, calibration: Mapping[str, float], stage: str) -> float | None:
    """Return seconds for `amount` of work, at the rate measured at the nearest size; None without one near enough."""
    for away in range(FARTHEST_DECADE + 1):
        for factor in (10.0**away, 10.0**-away):
            rate = calibration.get(calibration_key(stage, amount * factor))
            if rate:
                return amount / rate
    return None


# --- operations ----------------------------------------------------------------------------------


def dit_flops(config: Config, frames: int, height: int, width: int, text_rows: int, clip_tokens: int = 0) -> float:
    """Return FLOPs of one forward of one branch, context already prepared.

    frames, height, width  of the latents; a token is 1x2x2 of them.
    text_rows              rows of text that are attended.
    """
    tokens = frames * (height // 2) * (width // 2)
    if is_flux(config):
        return flux_cost.transformer_flops(config, tokens, text_rows)
    d, ffn = config["dim"], config["ffn_dim"]
    matrices = 12 * tokens * d * d + 4 * tokens * d * ffn  # q k v o, cross q o, feed-forward
    attention = 4 * tokens * d * (tokens + text_rows + clip_tokens)
    edges = 8 * tokens * d * (config["in_channels"] + config["out_channels"])
    time = 2 * d * (config.get("freq_dim", 256) + 7 * d)
    return float(config["num_layers"] * (matrices + attention) + edges + time)


def context_flops(config: Config, text_rows: int, clip_tokens: int = 0) -> float:
    """Return FLOPs of preparing one branch's context: text and CLIP tokens to keys and values of every block."""
    d, clip_dim = config["dim"], config.get("clip_dim", 1280)
    text = 2 * text_rows * d * (config.get("text_dim", 4096) + d)
    clip = 2 * clip_tokens * clip_dim * (clip_dim + d)
    return float(text + clip + config["num_layers"] * 4 * (text_rows + clip_tokens) * d * d)


def text_encoder_flops(config: Config, tokens: float) -> float:
    """Return FLOPs of one prompt through the umT5 encoder."""
    d, wide = config["dim"], config["dim_attn"]
    layer = 2 * tokens * (4 * d * wide + 3 * d * config["ffn_dim"]) + 4 * tokens**2 * wide
    return float(config["num_layers"] * layer)


def clip_tokens_of(config: Config) -> int:
    return int((config["image_size"] // config["patch_size"]) ** 2 + 1)


def clip_flops(config: Config) -> float:
    """Return FLOPs of one image through the CLIP vision tower, whose last block is not run."""
    d, tokens = config["dim"], clip_tokens_of(config)
    layer = 2 * tokens * d * d * (4 + 2 * config.get("mlp_ratio", 4)) + 4 * tokens**2 * d
    return float((config["num_layers"] - 1) * layer + 2 * (tokens - 1) * d * 3 * config["patch_size"] ** 2)


def vae_decode_flops(config: Config, frames: int, height: int, width: int) -> float:
    """Return FLOPs of decoding latents [z, frames, height, width], the middle attention included."""
    return _vae_flops(config, frames, height * width, _decoder)


def vae_encode_flops(config: Config, frames: int, height: int, width: int) -> float:
    """Return FLOPs of encoding to latents [z, frames, height, width]."""
    return _vae_flops(config, frames, height * width, _encoder)


# --- the autoencoder, layer by layer -------------------------------------------------------------


class _Conv(NamedTuple):
    """One convolution for one latent frame: kernel taps, and how many positions it is applied at per latent cell."""

    in_channels: int
    out_channels: int
    taps: int
    frames: int
    area: int
    history: bool = False  # keeps two frames of its input


def _vae_flops(config: Config, frames: int, cells: int, layers: Any) -> float:
    if is_flux(config):
        return flux_cost.autoencoder_flops(config, cells, decoder=layers is _decoder)
    deepest = config["dim_mult"][-1] * _width(config, layers is _decoder)
    attention = 4 * deepest * (4 * deepest // 2 + cells)  # qkv and proj, then scores and values, per cell and frame

    def once(first: bool) -> float:
        convs = sum(2 * c.in_channels * c.out_channels * c.taps * c.frames * c.area for c in layers(config, first))
        return float(cells * (convs + attention))

    return once(True) + (frames - 1) * once(False)


def _width(config: Config, decoder: bool) -> int:
    return int((config.get("dec_dim") or config["dim"]) if decoder else config["dim"])


def _patch(config: Config) -> int:
    return 1 if config["version"] == "2.1" else 2


def _blocks(in_dim: int, out_dim: int, count: int, taps: int, frames: int, area: int) -> Iterator[_Conv]:
    for _ in range(count):
        yield _Conv(in_dim, out_dim, taps, frames, area, True)
        yield _Conv(out_dim, out_dim, taps, frames, area, True)
        if in_dim != out_dim:
            yield _Conv(in_dim, out_dim, 1, frames, area)
        in_dim = out_dim


def _decoder(config: Config, first: bool) -> Iterator[_Conv]:
    """Convolutions of one latent frame; a clip's first frame meets only the last temporal tap and stays one frame."""
    z, mult, base = config["z_dim"], config["dim_mult"], _width(config, True)
    dims = [base * m for m in (mult[-1], *reversed(mult))]
    temporal = (*reversed(config["temporal_downsample"]), False)
    halves = config["version"] == "2.1"
    taps, frames, area = (9 if first else 27), 1, 1
    yield _Conv(z, z, 1, 1, 1)
    yield _Conv(z, dims[0], taps, 1, 1, True)
    yield from _blocks(dims[0], dims[0], 2, taps, 1, 1)
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        in_dim = in_dim // 2 if halves and level else in_dim
        yield from _blocks(in_dim, out_dim, config["num_res_blocks"] + 1, taps, frames, area)
        if level < len(mult) - 1:
            if temporal[level] and not first:
                yield _Conv(out_dim, 2 * out_dim, 3, frames, area, True)
                frames *= 2
            area *= 4
            yield _Conv(out_dim, out_dim // 2 if halves else out_dim, 9, frames, area)
    yield _Conv(dims[-1], 3 * _patch(config) ** 2, taps, frames, area, True)


def _encoder(config: Config, first: bool) -> Iterator[_Conv]:
    """Convolutions of the pixel frames of one latent frame: one at the start of a clip, else all of the stride."""
    z, mult, base = config["z_dim"], config["dim_mult"], _width(config, False)
    dims = [base * m for m in (1, *mult)]
    temporal = (*config["temporal_downsample"], False)
    taps, frames = (9, 1) if first else (27, 2 ** sum(config["temporal_downsample"]))
    area = 4 ** (len(mult) - 1)
    yield _Conv(3 * _patch(config) ** 2, dims[0], taps, frames, area, True)
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        yield from _blocks(in_dim, out_dim, config["num_res_blocks"], taps, frames, area)
        if level < len(mult) - 1:
            area //= 4
            yield _Conv(out_dim, out_dim, 9, frames, area)
            if temporal[level] and not first:
                frames //= 2
                yield _Conv(out_dim, out_dim, 3, frames, area, True)
    yield from _blocks(dims[-1], dims[-1], 2, taps, frames, area)
    yield _Conv(dims[-1], 2 * z, taps, frames, area, True)
    yield _Conv(2 * z, 2 * z, 1, frames, area)


# --- memory --------------------------------------------------------------------------------------


def _models(plan: Plan) -> dict[str, list[ModelRef]]:
    """Return the models of each stage, in the order they run."""
    stages = {"encode text": [plan.text_encoder]}
    if plan.images:
        stages["encode images"] = [plan.vae, *([plan.clip_vision] if plan.clip_vision else [])]
    experts = list(plan.experts.values())
    return stages | {"load": [plan.experts[plan.steps[0].expert]], "sample": experts, "decode": [plan.vae]}


def _weights(ref: ModelRef) -> int:
    return ref.weight_bytes


def _branches(plan: Plan) -> int:
    return 2 if any(step.guidance != 1.0 for step in plan.steps) else 1


def _activations(plan: Plan, stage: str) -> float:
    _, frames, height, width = plan.latent
    if stage == "sample":
        return max(
            dit_activation_bytes(ref.config, frames, height, width, plan.text_len, _branches(plan), BYTES[ref.dtype])
            for ref in plan.experts.values()
        )
    if stage == "decode":
        height, width = _tiled(plan, height), _tiled(plan, width)
        return vae_activation_bytes(plan.vae.config, plan.chunk, height, width, BYTES[plan.vae.dtype], decoder=True)
    if stage == "encode images":
        height, width = _tiled(plan, height), _tiled(plan, width)
        return vae_activation_bytes(plan.vae.config, plan.chunk, height, width, BYTES[plan.vae.dtype], decoder=False)
    if stage == "encode text":
        config = plan.text_encoder.config
        return float(4 * plan.text_len * (3 * config["ffn_dim"] + 2 * config["dim"]))
    return 0.0


def _tiled(plan: Plan, cells: int) -> int:
    stride = plan.height // plan.latent[2]
    return min(cells, plan.tile // stride) if plan.tile else cells


def dit_activation_bytes(
    config: Config, frames: int, height: int, width: int, text_rows: int, branches: int, dtype_bytes: int
) -> float:
    """Return bytes above the weights at the fullest moment of a forward.

    The residual stream and one normalised copy are float32; then either queries, keys, values and the
    float32 pair of a rotation are alive, or the feed-forward's two hidden rows. Keys and values of the
    context are kept for every branch.
    """
    tokens = frames * (height // 2) * (width // 2)
    if is_flux(config):
        return branches * flux_cost.transformer_bytes(config, tokens, text_rows, dtype_bytes)
    d, ffn = config["dim"], config["ffn_dim"]
    attention = 4 * d * dtype_bytes + 16 * d
    feed_forward = (2 * ffn + d) * dtype_bytes + 4 * d
    context = branches * config["num_layers"] * 2 * text_rows * d * dtype_bytes
    return float(tokens * (8 * d + max(attention, feed_forward)) + context)


def vae_activation_bytes(
    config: Config, chunk: int, height: int, width: int, dtype_bytes: int, *, decoder: bool
) -> float:
    """Return bytes above the weights at the fullest layer, plus what the causal convolutions remember.

    height, width  of the latents, or of a tile of them; chunk: latent frames at a time.
    """
    cells = height * width
    if is_flux(config):
        return flux_cost.autoencoder_bytes(config, cells, dtype_bytes, decoder=decoder)
    convs = list((_decoder if decoder else _encoder)(config, first=False))
    memory = sum(2 * c.in_channels * c.area for c in convs if c.history)
    # Input, its copy with two remembered frames in front, output, and the block's own input for the shortcut.
    fullest = max(
        c.area * (c.in_channels * (3 * chunk * c.frames + (2 if c.history else 0)) + c.out_channels * chunk * c.frames)
        for c in convs
    )
    return float(WORKSPACE * cells * dtype_bytes * (memory + fullest))
