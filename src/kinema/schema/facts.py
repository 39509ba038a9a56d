"""What was found out before the plan: of files, inputs, the machine, and of models what no file holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kinema.lora import CatalogLora, LoraFacts
from kinema.schema.words import Component, Expert, Frozen, Solver


class Note(Frozen):
    """Something decided for the user that they may want to know. Never empty talk."""

    about: str
    text: str


class FileFacts(Frozen):
    """What one checkpoint says of itself, from its header alone.

    quantisation       how its packed weights are stored, in words; "" for a plain file.
    packed_parameters  parameters that stay packed when it is loaded, of packed_bytes.
    matrix_parameters  parameters that may be packed when it is loaded: those of its large linear layers.
    matrix_width        largest number that the length of every row of those divides into.
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
    matrix_width: int = 0
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

    files     by role: dit, dit_high, vae, text_encoder, clip_vision, audio_encoder, motion_controller.
    loras     in the order of `Request.lora`; known_loras: the published ones, by name.
    media     by Request field, in order where a field takes several.
    notes     what was decided while looking: which of several installed files is used.
    cut       tokens of prompt and negative, by field, beyond what the model reads; cut_by_clip: what FLUX's CLIP reads.
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
    cut_by_clip: dict[str, int] = {}
    existing: frozenset[str] = frozenset()
    output_free: int | None = None


COMPONENTS: dict[str, dict[str, Component]] = {
    "wan": {
        "dit": "dit",
        "dit_high": "dit",
        "vae": "vae",
        "text_encoder": "text_encoder",
        "clip_vision": "clip_vision",
        "audio_encoder": "audio_encoder",
        "motion_controller": "motion_controller",
    },
    "flux": {
        "dit": "flux_dit",
        "vae": "flux_vae",
        "text_encoder": "t5",
        "clip_vision": "siglip",
        "clip_text": "clip_text",
        "redux": "redux",
    },
}
"""Family -> role -> what kind of model fills it."""

PARTS = {
    "wan": {
        "text_encoder": "umt5-xxl",
        "clip_vision": "clip-vit-h",
        "audio_encoder": "wav2vec2",
        "motion_controller": "wan2.1-speedcontrol-1.3b",
    },
    "flux": {
        "vae": "flux-ae",
        "text_encoder": "t5-xxl",
        "clip_text": "clip-l",
        "clip_vision": "sigclip-so400m",
        "redux": "flux.1-redux-dev",
    },
}
"""Family -> role -> the part of the catalog that fills it; the vae of a Wan model is that of its entry."""


class CatalogEntry(Frozen):
    """One model: the facts no file holds. Numbers are the official defaults.

    tasks, use   what it is for: words of `kinema models plan --task`, and a sentence for people who choose.
    dit_of       another model, whose DiT this one runs with.
    structure    fields of the DiT's configuration that its header must show; true for an adapter it must have,
                 "optional" for one that only some of its files have.
    takes, needs Request fields the model accepts, of media and of what only some have, and those it cannot do without.
    first_frame  "concat": mask and image are extra channels; "overwrite": the clean latent replaces the noise.
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
    tasks: tuple[str, ...] = ()
    use: str = ""
    family: Literal["wan", "flux"] = "wan"
    dit_of: str = ""
    experts: tuple[Expert, ...] = ("model",)
    structure: dict[str, Any]
    vae: Literal["wan2.1", "wan2.2", "flux"]
    text_len: int = 512
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    first_frame: Literal["concat", "overwrite"] = "concat"
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

    @property
    def dit_roles(self) -> tuple[str, ...]:
        """Return the roles of its DiTs: of two experts the low-noise one first."""
        return ("dit", "dit_high") if "high" in self.experts else ("dit",)

    @property
    def roles(self) -> tuple[str, ...]:
        """Return the roles of the files without which it cannot run."""
        clip = bool(self.structure.get("has_clip_tokens"))
        more = {"clip_vision": clip or self.redux, "clip_text": self.family == "flux", "redux": self.redux}
        more["audio_encoder"] = bool(self.structure.get("speech"))
        return (*self.dit_roles, "vae", "text_encoder", *(role for role, needed in more.items() if needed))

    @property
    def parts(self) -> dict[str, str]:
        """Return the shared part of the catalog that fills each role beside the DiT's."""
        return {role: self.part(role) for role in self.roles if role not in self.dit_roles}

    def part(self, role: str) -> str:
        """Return the shared part of the catalog that fills a role beside the DiT's."""
        return PARTS[self.family].get(role) or f"{self.vae}-vae"

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
