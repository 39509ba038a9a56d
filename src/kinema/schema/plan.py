"""What will be done: every decision of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from kinema.lora import LoraPlan, LoraRef
from kinema.schema.facts import Note
from kinema.schema.request import Request
from kinema.schema.words import Component, Dtype, Expert, Frozen, OutputKind, Precision, Solver


class ModelRef(Frozen):
    """Recipe of one loaded model: files, structure and how to hold it. Hashable by its JSON.

    quantisation  how its large matrices are held: in words as the file has them, or a Quantise they are rounded to
                  when loaded; "" holds them plain, in `dtype`.
    fp8_matmul    multiply fp8 matrices as they are, activations rounded to fp8 row by row.
    loras            those it has, in order; lora_bytes is their memory where they are held beside the weights.
    stored           dtype of most of the file.
    matrix_parameters, blocks, float32_parameters   as in FileFacts.
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
    matrix_parameters: int = 0
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
    filter: Literal["lanczos", "bicubic", "bilinear", "antialiased"]
    clip: bool = False
    frame: int | None = None
    from_video: bool = False
    mask: Path | None = None


class VideoPlan(Frozen):
    """How one input video is brought to the rate, length and size of the one that is made.

    role    "source" is what video to video starts from; "video" is kept, where there is no mask.
    frames  how many are used, from the first on; they are frames 0, 1, ... of the result.
    files   of a folder, the images in it.
    still   it is one picture: of a mask or a background, that of every frame.
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


class MotionPlan(Frozen):
    """How much is to move: what a motion controller adds to the modulation of every block, at every step."""

    controller: ModelRef
    bucket_id: int


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
    motion: MotionPlan | None = None
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
        encoders = (self.text_encoder, self.clip_vision, self.audio_encoder, self.motion and self.motion.controller)
        flux = (self.flux.clip_text, self.flux.siglip, self.flux.redux) if self.flux else ()
        refs = [ref for ref in (*self.experts.values(), self.vae, *encoders, *flux) if ref]
        weights = [file for ref in refs for file in ref.files]
        loras = [lora.path for ref in refs for lora in ref.loras]
        others = [*(ref.tokenizer for ref in refs), *(image.path for image in self.images)]
        others += [file for video in self.videos for file in video.files or (video.path,)]
        others += [image.mask for image in self.images if image.mask]
        others += [self.camera.path] if self.camera else []
        others += [self.speech.audio, self.speech.pose] if self.speech else []
        others += [self.sound.path] if self.sound else []
        return tuple(dict.fromkeys([*weights, *loras, *(file for file in others if file)]))
