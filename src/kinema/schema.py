"""The nouns without tensors: what is asked (Request), what was found out (facts), what will be done (Plan).

Everything here is frozen, JSON in and JSON out, and knows nothing of torch. The command line, the
JSON Schema, HTTP bodies and the reference page are all generated from `Request`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from kinema.lora import CatalogLora as CatalogLora
from kinema.lora import LoraFacts, LoraRef, parse_loras
from kinema.lora import LoraPlan as LoraPlan

Expert = Literal["model", "high", "low"]
Solver = Literal["unipc", "dpmpp", "euler"]
Precision = Literal["fast", "reference"]
Quantise = Literal["fp8", "fp8-64", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]
Placement = Literal["device", "streamed", "cpu"]
Component = Literal[
    "dit",
    "vae",
    "text_encoder",
    "clip_vision",
    "audio_encoder",
    "flux_dit",
    "flux_vae",
    "t5",
    "clip_text",
    "siglip",
    "redux",
]
OutputKind = Literal["mp4", "webm", "gif", "webp", "png", "latents"]

AREAS = {"480p": 832 * 480, "720p": 1280 * 720}
"""Named areas in pixels: the aspect then comes from the input image, or is 16:9 without one."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- what is asked ---------------------------------------------------------------------------


def _parse_size(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return f"{value[0]}x{value[1]}"
    return re.sub(r"\s*[*xX×]\s*", "x", str(value).strip()) if value is not None else None


def _check_size(value: str | None) -> str | None:
    if value is not None and value not in AREAS and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", value):
        raise ValueError(f"size {value!r} is neither WIDTHxHEIGHT nor one of {', '.join(AREAS)}; for example 832x480")
    return value


UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _parse_bytes(value: Any) -> Any:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(value).lower())
    if isinstance(value, str) and (found is None or found[2] not in UNITS):
        raise ValueError(f"{value!r} is not an amount of memory; for example 12GB, 11.5GiB or 800MB")
    return round(float(found[1]) * UNITS[found[2]]) if found and isinstance(value, str) else value


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
    background: Path | None = _field("media", "Background video.")
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


class Hub(Frozen):
    """Where files come from: Hugging Face or a mirror of it, ModelScope, and who asks.

    token       of Hugging Face; token_file is where its own command line keeps one.
    """

    endpoint: str = "https://huggingface.co"
    modelscope: str = "https://modelscope.cn"
    token: SecretStr | None = None
    token_file: Path | None = None


class Settings(Frozen):
    """Where things are on this machine; clients fill it from flags, environment and configuration file.

    models            roots searched for model files, in order: models folders, or ComfyUI's own folder.
    extra_model_paths further extra_model_paths.yaml files of ComfyUI.
    folders           directories by ComfyUI's folder key, where such a file changes them; {}: those of the roots.
    hub_caches        caches of huggingface_hub, searched last.
    store             root that files are pulled to; None: the first of `models`.
    catalogs          extra catalog TOML files.
    speech_key        what a speech service asks for; sent to `speech_url`, and nowhere else.
    cache             folder of the hash cache and this machine's calibration; None keeps neither.
    """

    models: tuple[Path, ...] = ()
    extra_model_paths: tuple[Path, ...] = ()
    folders: dict[str, tuple[Path, ...]] = {}
    hub_caches: tuple[Path, ...] = ()
    store: Path | None = None
    catalogs: tuple[Path, ...] = ()
    cache: Path | None = None
    hub: Hub = Hub()
    speech_key: SecretStr | None = None


# --- what was found out before the plan --------------------------------------------------------


class FileFacts(Frozen):
    """What one checkpoint says of itself, from its header alone.

    quantisation       how its packed weights are stored, in words; "" for a plain file.
    packed_parameters  parameters that stay packed when it is loaded, of packed_bytes.
    matrix_parameters  parameters that may be packed when it is loaded: those of its large linear layers.
    blocks              parameters of each block, with those of the modules that run with it.
    float32_parameters  how many of the others stay float32 whatever the dtype.
    """

    path: Path
    files: tuple[Path, ...]
    bytes: int
    container: Literal["safetensors", "pth", "gguf"]
    component: Component
    dialect: str
    dtype: str
    tensors: int
    parameters: int
    config: dict[str, Any]
    quantisation: str = ""
    packed_parameters: int = 0
    packed_bytes: int = 0
    matrix_parameters: int = 0
    structure: str = ""
    ignored: tuple[str, ...] = ()
    has_tokenizer: bool = False
    name_suggests: Literal["high", "low"] | None = None
    blocks: tuple[int, ...] = ()
    float32_parameters: int = 0


class MediaFacts(Frozen):
    """What one input image, video or sound says of itself. Sizes are after rotation metadata.

    files          of a folder of images, those it holds, in order.
    frames         of a camera file, the poses in it.
    fps            of a video, the mean where its rate varies; None where there is no time, as in a folder of frames.
    seconds        of a video from the first frame's start to the last one's end, less the tick that times are rounded
                   to, so that ceil(seconds * rate) frames are on display at any rate; of sound, all of it.
    rate, channels, silent   of sound: samples a second, channels, and whether every sample is zero.
    """

    path: Path
    files: tuple[Path, ...] = ()
    kind: Literal["image", "video", "audio", "camera"]
    width: int = 0
    height: int = 0
    frames: int = 1
    fps: float | None = None
    seconds: float | None = None
    variable_rate: bool = False
    has_alpha: bool = False
    rate: int = 0
    channels: int = 0
    silent: bool = False


class Machine(Frozen):
    """What this machine has. Memory in bytes.

    bfloat16, fp8_matmul  whether it multiplies such numbers in hardware.
    calibration           `calibration_key` -> measured work per second.
    """

    device: str = "cpu"
    name: str = ""
    memory_total: int = 0
    memory_free: int = 0
    ram_total: int = 0
    ram_free: int = 0
    cores: int = 1
    bfloat16: bool = True
    fp8_matmul: bool = False
    calibration: dict[str, float] = {}


def calibration_key(stage: str, work: float) -> str:
    """Name a stage at one decade of work, FLOPs or bytes to load: a small job runs at another rate than a large one."""
    return f"{stage} 1e{math.floor(math.log10(work))}"


class Facts(Frozen):
    """Everything a plan depends on besides the request and the catalog.

    files     by role: dit, dit_high, vae, text_encoder, clip_vision, audio_encoder.
    loras     in the order of `Request.lora`; known_loras: the published ones, by name.
    media     by Request field, in order where a field takes several.
    notes     what was decided while looking: which of several installed files is used.
    cut       tokens of prompt and negative, by field, beyond what the model reads.
    existing  names already present in the folder the output goes to.
    """

    files: dict[str, FileFacts] = {}
    loras: tuple[LoraFacts, ...] = ()
    known_loras: dict[str, CatalogLora] = {}
    tokenizer: Path | None = None
    clip_tokenizer: Path | None = None
    media: dict[str, tuple[MediaFacts, ...]] = {}
    machine: Machine = Machine()
    notes: tuple[Note, ...] = ()
    cut: dict[str, int] = {}
    existing: frozenset[str] = frozenset()
    output_free: int | None = None


class CatalogEntry(Frozen):
    """One model: the facts no file holds. Numbers are the official defaults.

    structure    fields of the DiT's configuration that its header must show; true for an adapter it must have,
                 "optional" for one that only some of its files have.
    takes, needs Request fields of media the model accepts, and those it cannot do without.
    first_frame  "concat": mask and image are extra channels; "overwrite": the clean latent replaces the noise.
    no_image     what a concat model does without an image: zeros in those channels, or a refusal.
    sizes        width x height it was trained on; image_sizes more of them for single frames.
    kontext      reference images become tokens beside those of the picture.
    redux        reference images become rows beside those of the text.
    shift_by_tokens  the shift grows with the size, as FLUX.1 was trained; then `shift` means nothing.
    clip_frames  frames made at a time, of models that go on from their own frames clip by clip; history_frames: how
                 many of those before a clip it sees.
    by_area      the input image's aspect, at the area of `size`, is the default size.
    prompt       what a request without a prompt says; negative likewise.
    shift_480p   shift at areas up to 832x480, where the official code has another one there.
    files        file names by role under a models folder, best first.
    """

    name: str
    title: str
    family: Literal["wan", "flux"] = "wan"
    experts: tuple[Expert, ...] = ("model",)
    structure: dict[str, Any]
    vae: Literal["wan2.1", "wan2.2", "flux"]
    text_len: int = 512
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    first_frame: Literal["concat", "overwrite"] = "concat"
    no_image: Literal["zeros", "refuse"] = "refuse"
    size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...] = ()
    image_sizes: tuple[tuple[int, int], ...] = ()
    by_area: bool = False
    kontext: bool = False
    redux: bool = False
    clip_frames: int | None = None
    history_frames: int = 0
    frames: int = 81
    fps: float = 16
    steps: int = 50
    shift: float = 5.0
    shift_by_tokens: bool = False
    shift_480p: float | None = None
    guidance: float = 5.0
    guidance_high: float | None = None
    boundary: float | None = None
    solver: Solver = "unipc"
    prompt: str = ""
    negative: str = ""
    licence: str = ""
    repositories: tuple[str, ...] = ()
    files: dict[str, tuple[str, ...]] = {}
    aliases: tuple[str, ...] = ()

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """Return the first field in which a DiT's configuration is not this model's, None where all agree.

        An adapter that this model does not name is a misfit as well: VACE is text to video, and more.
        """
        for field, wanted in self.structure.items():
            found = config.get(field)
            if wanted == "optional":
                continue
            if (bool(found) if isinstance(wanted, bool) else found) != wanted:
                return field
        adapters = (field for field, value in config.items() if isinstance(value, Mapping))
        return next((field for field in adapters if field not in self.structure), None)


# --- what will be done ---------------------------------------------------------------------------


class ModelRef(Frozen):
    """Recipe of one loaded model: files, structure and how to hold it. Hashable by its JSON.

    quantisation  how its large matrices are held: in words as the file has them, or a Quantise they are rounded to
                  when loaded; "" holds them plain, in `dtype`.
    fp8_matmul    multiply fp8 matrices as they are, activations rounded to fp8 row by row.
    loras            those it has, in order; lora_bytes is their memory where they are held beside the weights.
    stored           dtype of most of the file.
    blocks, float32_parameters   as in FileFacts.
    resident_blocks  how many blocks stay on the device, the others being streamed; None: the model is there as a whole.
    ffn_tokens       tokens that pass a feed-forward at once; None: all.
    """

    component: Component
    files: tuple[Path, ...]
    dialect: str
    container: Literal["safetensors", "pth", "gguf"]
    config: dict[str, Any]
    dtype: Dtype
    device: str = "cpu"
    bytes: int = 0
    parameters: int = 0
    quantisation: str = ""
    packed_parameters: int = 0
    packed_bytes: int = 0
    fp8_matmul: bool = False
    attention: str = "sdpa"
    tokenizer: Path | None = None
    loras: tuple[LoraRef, ...] = ()
    lora_mode: Literal["branch", "fuse"] = "branch"
    lora_bytes: int = 0
    stored: str = ""
    blocks: tuple[int, ...] = ()
    float32_parameters: int = 0
    resident_blocks: int | None = None
    ffn_tokens: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Memory of the loaded weights."""
        plain = self.parameters - self.packed_parameters
        return self.packed_bytes + plain * (4 if self.dtype == "float32" else 2)

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class Note(Frozen):
    """Something decided for the user that they may want to know. Never empty talk."""

    about: str
    text: str


class PlanStep(Frozen):
    """One denoising step. `timestep` is what the DiT sees, `sigma` what the update uses.

    loras  strength of each of the expert's LoRAs, in the order of its ModelRef.
    """

    sigma: float
    timestep: float
    expert: Expert
    guidance: float
    loras: tuple[float, ...] = ()


class StageCost(Frozen):
    """Prediction for one stage. `seconds` is None where this machine has no calibration yet.

    peak_bytes    on the device, models of earlier stages that stay included.
    host_bytes    of host memory beside a GPU; 0 on a CPU.
    mapped_bytes  of files mapped on a CPU: memory that the system lends while it has some, and is in no peak.
    """

    stage: str
    peak_bytes: int
    seconds: float | None = None
    host_bytes: int = 0
    mapped_bytes: int = 0


class OutputPlan(Frozen):
    """Where results go. `paths` has one list of files a seed, in the order of `kinds`."""

    kinds: tuple[OutputKind, ...]
    paths: tuple[tuple[Path, ...], ...]
    quality: int = 80
    preview: Path | None = None
    strip: bool = False


class ImagePlan(Frozen):
    """How one image is brought to the video's size: cover-crop, whole on white (`pad`), or plain resize.

    clip        whether the model sees its CLIP tokens too, which are of the whole image.
    frame       of a middle image, the frame of the result that shows it.
    from_video  `path` is a video, and the image its last frame.
    mask        of a control image: the picture that is white where it counts.
    """

    role: str
    path: Path
    width: int
    height: int
    crop: bool
    pad: bool = False
    filter: Literal["lanczos", "bicubic", "bilinear"]
    clip: bool = False
    frame: int | None = None
    from_video: bool = False
    mask: Path | None = None


class VideoPlan(Frozen):
    """How one input video is brought to the rate, length and size of the one that is made.

    role    "source" is what video to video starts from; "video" is kept, where there is no mask.
    frames  how many are used, from the first on; they are frames 0, 1, ... of the result.
    files   of a folder, the images in it.
    still   it is one picture: of a mask, that of every frame.
    fit     crop it at its centre, or show it whole, with bars that are made.
    """

    role: str
    path: Path
    files: tuple[Path, ...] = ()
    fps: float
    frames: int
    still: bool = False
    width: int
    height: int
    fit: Literal["crop", "whole"] = "crop"


class OneFramePlan(Frozen):
    """One-frame inference: each latent frame is a picture of its own.

    positions  place in time of each latent frame, rising.
    target     which of them is made; `controls`: which shows each control image, in the order these were given.
    """

    positions: tuple[int, ...]
    target: int
    controls: tuple[int, ...]


class CameraSegment(Frozen):
    """A stretch of frames in which the camera moves evenly: what each frame adds, in the camera's own axes.

    shift  right, down and forward, in the unit of the published presets (their total is 1.5 over 81 frames).
    turn   rotation vector about those axes, in radians: up, right and clockwise are positive.
    """

    frames: int
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: tuple[float, float, float] = (0.0, 0.0, 0.0)


class CameraPlan(Frozen):
    """What the camera does in every frame: the segments, or as many poses of the file at `path`."""

    segments: tuple[CameraSegment, ...]
    path: Path | None = None


class ClipPlan(Frozen):
    """One clip of a video that is made clip by clip, each on the frames of those before.

    start    the clip's place in what drives it (sound, pose), in frames.
    frames   frames that are decoded of it.
    skip     of these, how many at its start are not shown: they are given, or not good.
    shown    how many are, after those.
    """

    start: int
    frames: int
    skip: int = 0
    shown: int


class SpeechPlan(Frozen):
    """What drives a speech-driven video.

    audio            any sound file; the reference is the plan's image of that role.
    pose             video of a skeleton at the video's rate, None without one.
    history_frames   pixel frames before a clip that the model sees.
    from_reference   the video goes on from the reference image, as if it had been shown before.
    """

    audio: Path
    pose: Path | None = None
    history_frames: int = 73
    from_reference: bool = False


class AnimatePlan(Frozen):
    """What Animate makes of the plan's videos (pose, face, and to replace somebody mask and background or video).

    overlap   frames of a clip that the next one begins with.
    """

    overlap: int
    replaces: bool = False


class SoundPlan(Frozen):
    """The sound of a video: `seconds` of a file from `start` on, or as much of it as there is."""

    path: Path
    start: float = 0.0
    seconds: float


class FluxPlan(Frozen):
    """What FLUX.1 is told besides text rows and channels.

    clip_text      the encoder of the pooled text.
    guidance       the scale the model was distilled with as an input; None where it has no such input.
    siglip, redux  what makes text rows of reference images; None where there are none.
    """

    clip_text: ModelRef
    guidance: float | None = None
    siglip: ModelRef | None = None
    redux: ModelRef | None = None


class Limits(Frozen):
    """Memory in bytes a run stays within, on the device and on the host; 0: unknown. On a CPU they are one.

    given  Request fields by which the user decided how memory is used.
    """

    device: int = 0
    host: int = 0
    given: tuple[str, ...] = ()


class Plan(Frozen):
    """Every decision of a run, no tensors. `kinema plan` prints it; the output file carries it; replay runs it.

    latent            (channels, latent frames, rows, columns) of one sampling: of a clip, where there are clips; its
                      first `reference_frames` latent frames are of reference images, and not part of the video.
    concat            what the channels after the noise are, in order: `control` and `start` are latents of a video and
                      of frame 0, `masked` those of all that is known, `mask` says where that is.
    clips             how a long video is made of several samplings; empty where one makes all of it.
    sound             what is heard in outputs that can hold it.
    strength          of video or picture to the same: `steps` are the last of a schedule, from the noised source on.
    hashes, versions  sha256 of every one of `files` by path, and what ran them; filled in when the run ends.
    """

    version: Literal[1] = 1
    kinema: str
    request: Request
    model: str
    title: str
    licence: str
    task: str
    experts: dict[Expert, ModelRef]
    vae: ModelRef
    text_encoder: ModelRef
    clip_vision: ModelRef | None = None
    audio_encoder: ModelRef | None = None
    loras: tuple[LoraPlan, ...] = ()
    preset: str | None = None
    prompt: str
    negative: str
    text_len: int
    images: tuple[ImagePlan, ...] = ()
    first_frame: Literal["none", "concat", "overwrite"] = "none"
    videos: tuple[VideoPlan, ...] = ()
    concat: tuple[Literal["control", "mask", "masked", "start"], ...] = ()
    control_scale: float = 1.0
    reference_frames: int = 0
    camera: CameraPlan | None = None
    flux: FluxPlan | None = None
    one_frame: OneFramePlan | None = None
    strength: float | None = None
    width: int
    height: int
    frames: int
    fps: float
    latent: tuple[int, int, int, int]
    tokens: int
    clips: tuple[ClipPlan, ...] = ()
    speech: SpeechPlan | None = None
    animate: AnimatePlan | None = None
    sound: SoundPlan | None = None
    seeds: tuple[int, ...]
    solver: Solver
    shift: float
    boundary: float | None = None
    steps: tuple[PlanStep, ...]
    precision: Precision
    device: str
    tile: int | None = None
    chunk: int = 1
    vae_cache: Literal["device", "cpu"] = "device"
    limits: Limits = Limits()
    costs: tuple[StageCost, ...] = ()
    output: OutputPlan
    notes: tuple[Note, ...] = ()
    hashes: dict[str, str] = {}
    versions: dict[str, str] = {}

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Sigma at each step, then the final 0."""
        return (*(step.sigma for step in self.steps), 0.0)

    def shortened(self, clips: int) -> Plan:
        """Return the plan of the first `clips` clips alone."""
        first = self.clips[:clips]
        frames = sum(clip.shown for clip in first)
        sound = self.sound and self.sound.model_copy(update={"seconds": frames / self.fps})
        return self.model_copy(update={"clips": first, "frames": frames, "sound": sound})

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file the result depends on: weights, tokenizer, input images and sound."""
        encoders = (self.text_encoder, self.clip_vision, self.audio_encoder)
        refs = [ref for ref in (*self.experts.values(), self.vae, *encoders) if ref]
        weights = [file for ref in refs for file in ref.files]
        loras = [lora.path for ref in refs for lora in ref.loras]
        others = [self.text_encoder.tokenizer, *(image.path for image in self.images)]
        others += [file for video in self.videos for file in video.files or (video.path,)]
        others += [image.mask for image in self.images if image.mask]
        others += [self.camera.path] if self.camera else []
        others += [self.speech.audio, self.speech.pose] if self.speech else []
        others += [self.sound.path] if self.sound else []
        if self.flux:
            parts = (self.flux.clip_text, self.flux.siglip, self.flux.redux)
            weights += [file for ref in parts if ref for file in ref.files]
            others.append(self.flux.clip_text.tokenizer)
        return tuple(dict.fromkeys([*weights, *loras, *(file for file in others if file)]))


# --- what happens --------------------------------------------------------------------------------


class Progress(Frozen):
    """A stage has done `done` of `total` units; `eta_seconds` for this stage, None before the first unit.

    rate   units a second, where it is measured.
    """

    stage: str
    done: int
    total: int
    unit: Literal["", "bytes"] = ""
    rate: float | None = None
    eta_seconds: float | None = None
    seed: int | None = None


class Preview(Frozen):
    """A preview frame was written to `path` after step `step`."""

    step: int
    path: Path


class StageReport(Frozen):
    """What one stage really took."""

    stage: str
    seconds: float
    peak_bytes: int


class Result(Frozen):
    """One finished video: the files written, and what each stage took."""

    seed: int
    paths: tuple[Path, ...]
    plan: Plan
    stages: tuple[StageReport, ...]


Event = Progress | Preview | Note | Result
