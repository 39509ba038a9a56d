"""What a plan will take: floating-point operations and seconds of each stage, before anything is loaded.

Pure arithmetic over the configurations in a plan; a multiply-add counts as 2. Knows nothing of tensors:
the formulas follow the models' layers, and tests/unit/test_cost.py counts those layers' real operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from kinema.planning import flux_cost, memory
from kinema.planning.flux import rows_beside
from kinema.planning.flux_cost import is_flux
from kinema.planning.inputs import encoded_latent_frames, encodes
from kinema.schema import Machine, Plan, StageCost, calibration_key

Config = Mapping[str, Any]

FARTHEST_DECADE = 2  # a rate measured on work of another size, by this factor of ten, predicts nothing


def estimate(plan: Plan, machine: Machine) -> tuple[StageCost, ...]:
    """Return the costs of each stage, with its seconds where this machine has done the like before."""
    amounts = work(plan)
    runs = {"sample": max(1, len(plan.clips)), "decode": max(1, len(plan.clips))}

    def seconds(stage: str) -> float | None:
        once = predict_seconds(amounts[stage], machine.calibration, stage) if stage in amounts else None
        return None if once is None else once * runs.get(stage, 1)

    return tuple(cost.model_copy(update={"seconds": seconds(cost.stage)}) for cost in memory.costs(plan))


def work(plan: Plan) -> dict[str, float]:
    """Return the work of each stage for one seed, or for one clip of it: FLOPs, of "load" bytes.

    Stages the plan lacks are left out.
    """
    texts = [plan.prompt, *([plan.negative] if any(step.guidance != 1.0 for step in plan.steps) else [])]
    least = plan.text_len if plan.text_encoder.component == "t5" else 0  # whose texts are padded
    tokens = [min(max(least, len(text.encode()) / 4 + 2), plan.text_len) for text in texts]  # about 4 bytes a token
    _, frames, height, width = plan.latent
    amounts = {"encode text": sum(text_encoder_flops(plan.text_encoder.config, count) for count in tokens)}
    seen = sum(image.clip for image in plan.images)
    if encodes(plan) and not plan.clips:
        amounts["encode images"] = vae_encode_flops(plan.vae.config, encoded_latent_frames(plan), height, width)
        if plan.clip_vision is not None:
            amounts["encode images"] += seen * clip_flops(plan.clip_vision.config)
    first = plan.experts[plan.steps[0].expert]
    amounts["load"] = float(first.parameters * memory.BYTES[first.dtype])
    amounts["sample"] = sum(step_work(plan))
    history = (plan.speech.history_frames + 3) // 4 if plan.speech else 0  # decoded again, for the VAE to see
    amounts["decode"] = vae_decode_flops(plan.vae.config, frames + history - plan.reference_frames, height, width)
    return amounts


def step_work(plan: Plan) -> tuple[float, ...]:
    """Return the FLOPs of each denoising step: those without guidance run one branch."""
    seen = max(1, sum(image.clip for image in plan.images))
    clip_tokens = seen * clip_tokens_of(plan.clip_vision.config) if plan.clip_vision else 0
    rows = rows_beside(plan) if plan.flux else plan.text_len + clip_tokens
    dit = {expert: dit_flops(ref.config, plan.tokens, rows) for expert, ref in plan.experts.items()}
    return tuple(dit[step.expert] * (1 if step.guidance == 1.0 else 2) for step in plan.steps)


def predict_seconds(amount: float, calibration: Mapping[str, float], stage: str) -> float | None:
    """Return seconds for `amount` of work, at the rate measured at the nearest size; None without one near enough."""
    for away in range(FARTHEST_DECADE + 1):
        for factor in (10.0**away, 10.0**-away):
            rate = calibration.get(calibration_key(stage, amount * factor))
            if rate:
                return amount / rate
    return None


# --- operations ----------------------------------------------------------------------------------


def dit_flops(config: Config, tokens: int, rows: int) -> float:
    """Return FLOPs of one forward of one branch, context already prepared.

    tokens   all of them, those of adapters included.
    rows     of text and CLIP tokens that are attended.
    """
    if is_flux(config):
        return flux_cost.transformer_flops(config, tokens, rows)
    d, ffn = config["dim"], config["ffn_dim"]
    matrices = 12 * tokens * d * d + 4 * tokens * d * ffn  # q k v o, cross q o, feed-forward
    attention = 4 * tokens * d * (tokens + rows)
    edges = 8 * tokens * d * (config["in_channels"] + config["out_channels"])
    time = 2 * d * (config.get("freq_dim", 256) + 7 * d)
    hints = len((config.get("vace") or {}).get("layers", ()))
    blocks = (config["num_layers"] + hints) * (matrices + attention) + hints * 2 * tokens * d * d
    return float(blocks + _listening(config) * 4 * tokens * d * d + edges + time)


def _listening(config: Config) -> int:
    """How many times in a forward all tokens attend to sound, or to a face: a handful of rows each."""
    animate = config.get("animate")
    faces = config["num_layers"] // animate["interval"] if animate else 0
    return faces + len((config.get("speech") or {}).get("layers", ()))


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
    return _vae_flops(config, frames, height * width, decoder=True)


def vae_encode_flops(config: Config, frames: int, height: int, width: int) -> float:
    """Return FLOPs of encoding to latents [z, frames, height, width]."""
    return _vae_flops(config, frames, height * width, decoder=False)


# --- the autoencoder, layer by layer -------------------------------------------------------------


Conv = tuple[int, int, int, int]
"""One convolution: channels in and out, kernel taps, and how many positions it is applied at per latent cell."""


def _vae_flops(config: Config, frames: int, cells: int, *, decoder: bool) -> float:
    if is_flux(config):
        return flux_cost.autoencoder_flops(config, cells, decoder=decoder)
    deepest = config["dim_mult"][-1] * _width(config, decoder)
    attention = 4 * deepest * (4 * deepest // 2 + cells)  # qkv and proj, then scores and values, per cell and frame

    def once(first: bool) -> float:
        layers = (_decoder if decoder else _encoder)(config, first)
        convs = sum(2 * i * o * taps * positions for i, o, taps, positions in layers)
        return float(cells * (convs + attention))

    return once(True) + (frames - 1) * once(False)


def _width(config: Config, decoder: bool) -> int:
    return int((config.get("dec_dim") or config["dim"]) if decoder else config["dim"])


def _patch(config: Config) -> int:
    return 1 if config["version"] == "2.1" else 2


def _blocks(in_dim: int, out_dim: int, count: int, taps: int, positions: int) -> Iterator[Conv]:
    for _ in range(count):
        yield in_dim, out_dim, taps, positions
        yield out_dim, out_dim, taps, positions
        if in_dim != out_dim:
            yield in_dim, out_dim, 1, positions
        in_dim = out_dim


def _decoder(config: Config, first: bool) -> Iterator[Conv]:
    """Convolutions of one latent frame; a clip's first frame meets only the last temporal tap and stays one frame."""
    z, mult, base = config["z_dim"], config["dim_mult"], _width(config, True)
    dims = [base * m for m in (mult[-1], *reversed(mult))]
    temporal = (*reversed(config["temporal_downsample"]), False)
    halves = config["version"] == "2.1"
    taps, frames, area = (9 if first else 27), 1, 1
    yield z, z, 1, 1
    yield z, dims[0], taps, 1
    yield from _blocks(dims[0], dims[0], 2, taps, 1)
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        in_dim = in_dim // 2 if halves and level else in_dim
        yield from _blocks(in_dim, out_dim, config["num_res_blocks"] + 1, taps, frames * area)
        if level < len(mult) - 1:
            if temporal[level] and not first:
                yield out_dim, 2 * out_dim, 3, frames * area
                frames *= 2
            area *= 4
            yield out_dim, out_dim // 2 if halves else out_dim, 9, frames * area
    yield dims[-1], 3 * _patch(config) ** 2, taps, frames * area


def _encoder(config: Config, first: bool) -> Iterator[Conv]:
    """Convolutions of the pixel frames of one latent frame: one at the start of a clip, else all of the stride."""
    z, mult, base = config["z_dim"], config["dim_mult"], _width(config, False)
    dims = [base * m for m in (1, *mult)]
    temporal = (*config["temporal_downsample"], False)
    taps, frames = (9, 1) if first else (27, 2 ** sum(config["temporal_downsample"]))
    area = 4 ** (len(mult) - 1)
    yield 3 * _patch(config) ** 2, dims[0], taps, frames * area
    for level, (in_dim, out_dim) in enumerate(pairwise(dims)):
        yield from _blocks(in_dim, out_dim, config["num_res_blocks"], taps, frames * area)
        if level < len(mult) - 1:
            area //= 4
            yield out_dim, out_dim, 9, frames * area
            if temporal[level] and not first:
                frames //= 2
                yield out_dim, out_dim, 3, frames * area
    yield from _blocks(dims[-1], dims[-1], 2, taps, frames * area)
    yield dims[-1], 2 * z, taps, frames * area
    yield 2 * z, 2 * z, 1, frames * area
