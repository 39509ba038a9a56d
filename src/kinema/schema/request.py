"""What is asked: the one declaration of which command line, JSON Schema, HTTP bodies and reference page are made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from kinema.lora import LoraRef, parse_loras
from kinema.schema.words import AREAS, Dtype, Frozen, OutputKind, Placement, Precision, Quantise, Solver


def _parse_size(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]}x{value[1]}"
    return re.sub(r"\s*[*xX×]\s*", "x", str(value).strip()) if value is not None else None


def _check_size(value: str | None) -> str | None:
    if value is not None and value not in AREAS and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
        raise ValueError(f"size {value!r} is neither WIDTHxHEIGHT nor one of {', '.join(AREAS)}; for example 832x480")
    return value


UNITS = {"b": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


MOST_WITHOUT_UNIT = 9999
"""Gigabytes. A larger number that has no unit was meant as bytes, or as something else."""


def parse_bytes(text: str) -> int:
    """Return bytes of 12GB, 11.5 GiB, 800MB or plain gigabytes; ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(b|[kmgt]i?)?b?\s*", text.lower())
    if found is None or (found[2] is None and float(found[1]) > MOST_WITHOUT_UNIT):
        raise ValueError(f"{text!r} is not an amount of memory; for example 12GB, 11.5GiB or 800MB")
    return round(float(found[1]) * UNITS[found[2] or "g"])


def _parse_bytes(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | Path) else value


def _strings(value: Any) -> Any:
    many = _one_or_many(value)
    return tuple(map(str, many)) if isinstance(many, list | tuple) else many


SizeText = Annotated[str | None, BeforeValidator(_parse_size), AfterValidator(_check_size)]
Bytes = Annotated[int | None, BeforeValidator(_parse_bytes)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_one_or_many)]


def flag(field: str) -> str:
    """Return the command-line spelling of a field: guidance_high -> --guidance-high."""
    return "--" + field.replace("_", "-")


def _field(group: str, help: str, default: Any = None, **limits: Any) -> Any:
    return Field(default=default, description=help, json_schema_extra={"group": group}, **limits)


class Request(Frozen):
    """What the user wants. Every field is optional except a model and one input; None lets the plan decide."""

    model_config = ConfigDict(allow_inf_nan=False)

    prompt: str | None = _field("what", "What the video shows.")
    negative: str | None = _field("what", "What it should not show. Default: the model's own negative prompt.")

    model: str | None = _field("model", "Catalog name, a folder with the model's files, or hf:OWNER/NAME.")
    dit: Path | None = _field("model", "DiT file or folder; of two-expert models the low-noise expert.")
    dit_high: Path | None = _field("model", "DiT file or folder of the high-noise expert.")
    vae: Path | None = _field("model", "VAE file or folder.")
    text_encoder: Path | None = _field("model", "umT5 file or folder.")
    clip_vision: Path | None = _field("model", "CLIP vision file or folder.")
    audio_encoder: Path | None = _field("model", "wav2vec2 file or folder, of speech-driven models.")
    motion_controller: Path | None = _field("model", "Motion controller of Wan 2.1 T2V 1.3B, for a motion_bucket_id.")
    tokenizer: Path | None = _field(
        "model", "Folder or file of the umT5 or T5 tokenizer (spiece.model, tokenizer.json)."
    )
    clip_text: Path | None = _field("model", "CLIP-L text encoder of FLUX.")
    clip_tokenizer: Path | None = _field("model", "Folder or file of CLIP-L's tokenizer (vocab.json, tokenizer.json).")
    redux: Path | None = _field("model", "Redux embedder of FLUX, for reference images.")

    lora: Annotated[tuple[LoraRef, ...], BeforeValidator(parse_loras)] = _field(
        "model", "LoRA, as FILE:0.8@high,steps=1-3,only=PATTERN: all but FILE may be left out. Once for each LoRA.", ()
    )
    lora_mode: Literal["branch", "fuse"] | None = _field(
        "model", "branch (default): beside the weights, swapped without loading them again; fuse: into them."
    )
    preset: str | None = _field(
        "model",
        "Steps, shift, guidance and boundary of a distilled LoRA; none takes the model's. Default: by its name.",
    )

    first: Path | None = _field("media", "Image that frame 0 shows; of a video its last frame, to go on from.")
    last: Path | None = _field("media", "Image that the last frame shows.")
    middle: Annotated[tuple[str, ...], BeforeValidator(_strings)] = _field(
        "media", "Images that frames between show: IMAGE@40 of frame 40, IMAGE@25% a quarter on; IMAGE the middle.", ()
    )
    reference: Paths = _field("media", "Reference images.", ())
    control: Path | None = _field("media", "Control video (canny, depth, pose), or a folder of its frames.")
    control_image: Paths = _field("media", "Control images of one-frame inference.", ())
    control_mask: Paths = _field("media", "Masks of the control images.", ())
    mask: Path | None = _field("media", "Mask video or image; what is white is made anew, black is kept.")
    pose: Path | None = _field("media", "Pose video.")
    face: Path | None = _field("media", "Face video.")
    background: Path | None = _field("media", "Background video or image.")
    audio: Path | None = _field("media", "Speech or music.")
    camera: str | None = _field("media", 'Camera moves, such as "pan left" or "static 1s; dolly in", or a pose file.')
    video: Path | None = _field(
        "media", "Source video: what is kept where there is no mask, and goes on after its end."
    )
    one_frame: str | None = _field("media", "One-frame inference, for example target_index=1,control_index=0.")

    start_from_reference: bool = _field(
        "speech", "Go on from the reference image, as if it had been shown before.", False
    )
    clips: int | None = _field("speech", "How many clips to make. Default: until the sound ends.", ge=1)
    speech_text: str | None = _field("speech", "Text to be spoken, instead of a sound file.")
    speech_url: str | None = _field("speech", "Service that speaks it: any with OpenAI's /v1/audio/speech.")
    speech_voice: str | None = _field("speech", "Its voice. Default: alloy.")
    speech_model: str | None = _field("speech", "Its model. Default: tts-1.")

    size: SizeText = _field("shape", "WIDTHxHEIGHT in pixels, or 480p or 720p: that area at the image's aspect.")
    frames: int | None = _field("shape", "Frames, 4n+1; 1 makes an image.", ge=1)
    seconds: float | None = _field("shape", "Length in seconds, instead of frames.", gt=0)
    outpaint: bool = _field("shape", "Show the whole video inside the size, and make what is around it.", False)
    fps: float | None = _field("shape", "Frames per second of the file. Default: the model's own.", gt=0, le=240)
    overlap: int | None = _field("shape", "Animate: frames of a clip that the next one goes on from, 1 (default) or 5.")

    seed: int | None = _field("sampling", "Seed of the noise; the same on every device.", ge=0, lt=2**63)
    count: int = _field("sampling", "How many videos; seeds count up from the seed.", 1, ge=1, le=10_000)
    seeds: Annotated[tuple[int, ...], BeforeValidator(_split)] = _field("sampling", "Exact seeds, one video each.", ())
    steps: int | None = _field("sampling", "Denoising steps.", ge=1, le=1000)
    strength: float | None = _field(
        "sampling",
        "Video to video, picture to picture: share of the steps that are run, on the noised source. Default: 0.8.",
        gt=0,
        le=1,
    )
    shift: float | None = _field("sampling", "Timestep shift.", gt=0, le=1000)
    guidance: float | None = _field("sampling", "Guidance scale; of two-expert models the low-noise expert's.", ge=0)
    guidance_high: float | None = _field("sampling", "Guidance scale of the high-noise expert.", ge=0)
    true_guidance: float | None = _field(
        "sampling", "Guidance of FLUX by a second pass over the negative prompt; 1 (default) makes none.", ge=0
    )
    motion_bucket_id: int | None = _field(
        "sampling",
        "How much moves, 0 (slow) to 100 (fast), by the motion controller of Wan 2.1 T2V 1.3B.",
        ge=0,
        le=100,
    )
    control_scale: float | None = _field("sampling", "Weight of VACE's control; 1 is as trained.", ge=0, le=10)
    boundary: float | None = _field("sampling", "Switch of experts as a share of 1000 timesteps.", ge=0, le=1)
    solver: Solver | None = _field("sampling", "unipc, dpmpp or euler.")

    precision: Precision | None = _field("machine", "fast (default) or reference: float32 throughout.")
    quantise: Quantise | None = _field(
        "machine",
        "Round the DiT's large matrices when they are loaded: fp8 (a scale for each output), fp8-64 (one for each 64 "
        "weights) or int8. Default: hold them as the file does.",
    )
    quantise_text_encoder: Quantise | None = _field("machine", "The same for the text encoder.")
    fp8_matmul: bool | None = _field(
        "machine",
        "Multiply fp8 matrices as they are, activations rounded to fp8. Default: where the GPU can, in fast precision.",
    )
    device: str | None = _field("machine", "cpu, cuda, cuda:1 or mps. Default: the best present.")
    vram: Bytes = _field("machine", "Device memory to stay within, such as 12GB. Default: what is free.", gt=0)
    ram: Bytes = _field("machine", "Host memory to stay within, such as 32GB. Default: what is free.", gt=0)
    dtype: Dtype | None = _field("machine", "float32, bfloat16 or float16: what the DiT computes in.")
    blocks_to_swap: int | None = _field(
        "machine", "Blocks of each expert that pass through two slots of memory instead of staying.", ge=0
    )
    text_encoder_on: Placement | None = _field(
        "machine", "device, streamed (block by block) or cpu: where the text encoder runs."
    )
    ffn_tokens: int | None = _field("machine", "Tokens that pass a feed-forward at once, where memory is short.", ge=1)
    vae_cache: Literal["device", "cpu"] | None = _field(
        "machine", "device or cpu: where the VAE keeps the frames it remembers."
    )
    tile: int | None = _field("machine", "VAE tile edge in pixels, a multiple of 16, where memory is short.", ge=64)
    chunk: int | None = _field("machine", "Latent frames the VAE takes at once.", ge=1)

    output: Annotated[tuple[OutputKind, ...], BeforeValidator(_split)] = _field(
        "output", "mp4, webm, gif, webp, png, latents; several with commas. Default: mp4, or png for one frame.", ()
    )
    save: Path | None = _field("output", "File or folder to write to.")
    keep_audio: bool = _field("output", "Animate: with the sound of the source video, or else the pose video.", False)
    overwrite: bool = _field("output", "Replace files that exist.", False)
    quality: int | None = _field("output", "0 (smallest) to 100 (best) of the video encoder.", ge=0, le=100)
    preview: Path | None = _field("output", "PNG that shows a live preview frame while sampling.")
    save_steps: float | None = _field(
        "output", "Seconds between saved steps, from which `kinema resume` goes on; 0 saves each. Default: 60.", ge=0
    )
    strip: bool = _field("output", "Leave the plan out of the output file, and write none beside it.", False)
