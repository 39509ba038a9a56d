"""Bad input is refused before any weight is loaded, with what was given, what is allowed and what to type.

Every case runs `kinema generate` in full, on full-size checkpoints whose numbers are a hole in the file; loading
one raises. A case is its words, the class of the error, and what the message must hold: the value given first, then
what is allowed or nearest.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import kinema.residents
from checkpoints import manifest, write_sparse
from conftest import Cli
from tiny_world import film, picture, spiece_model

DITS = {
    "wan2.1_t2v_1.3B_fp16": "wan2.1_t2v_1.3B",
    "wan2.1_t2v_14B_fp16": "wan2.1_t2v_14B",
    "wan2.1_i2v_720p_14B_fp16": "wan2.1_i2v_14B",
    "wan2.1_flf2v_720p_14B_fp16": "wan2.1_flf2v_14B",
    "wan2.2_t2v_low_noise_14B_fp16": "wan2.2_t2v_a14B",
    "wan2.2_t2v_high_noise_14B_fp16": "wan2.2_t2v_a14B",
    "wan2.2_i2v_low_noise_14B_fp16": "wan2.2_i2v_a14B",
    "wan2.2_i2v_high_noise_14B_fp16": "wan2.2_i2v_a14B",
    "wan2.2_ti2v_5B_fp16": "wan2.2_ti2v_5B",
    "wan2.1_vace_1.3B_fp16": "wan2.1_vace_1.3B",
    "wan2.2_fun_control_low_noise_14B_bf16": "wan2.2_fun_control_a14B",
    "wan2.2_fun_control_high_noise_14B_bf16": "wan2.2_fun_control_a14B",
    "wan2.2_fun_camera_low_noise_14B_bf16": "wan2.2_fun_camera_a14B",
    "wan2.2_fun_camera_high_noise_14B_bf16": "wan2.2_fun_camera_a14B",
}
LORA = {f"diffusion_model.blocks.{i}.self_attn.q.lora_A.weight": (16, 5120) for i in range(2)}
LORA_UP = {f"diffusion_model.blocks.{i}.self_attn.q.lora_B.weight": (5120, 16) for i in range(2)}
FLUX_LORA = {
    "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (16, 3072),
    "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (9216, 16),
}


@dataclass(frozen=True)
class World:
    """models: a models folder of full-size files; media: images, broken files, prompt files."""

    models: Path
    media: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    models, media = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("media")
    for name, layout in DITS.items():
        write_sparse(models / f"diffusion_models/{name}.safetensors", manifest(layout))
    write_sparse(models / "vae/wan_2.1_vae.safetensors", manifest("wan2.1_vae"))
    write_sparse(models / "vae/wan2.2_vae.safetensors", manifest("wan2.2_vae"))
    write_sparse(models / "text_encoders/umt5_xxl_fp16.safetensors", manifest("umt5_xxl_encoder_official"))
    write_sparse(models / "clip_vision/clip_vision_h.safetensors", manifest("clip_vision_h_transformers"), "F16")
    (models / "text_encoders/spiece.model").write_bytes(spiece_model())
    _fill(media, models)
    yield World(models, media)
    shutil.rmtree(models)


def _fill(media: Path, models: Path) -> None:
    cat = picture(media / "cat.png", 832, 480)
    whole = cat.read_bytes()
    (media / "cut.png").write_bytes(whole[: len(whole) // 2])
    (media / "empty.png").write_bytes(b"")
    (media / "text.png").write_text("not a picture")
    film(media / "film.mp4", frames=5, width=64, height=32, fps=16)
    film(media / "short.mp4", frames=2, width=64, height=32, fps=16)
    picture(media / "tall.png", 32, 64)
    (media / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom" + b"\0" * 64)
    (media / "folder.png").mkdir()
    (media / "folder.mp4").mkdir()
    (media / "there.mp4").write_bytes(b"a film")
    Image.new("L", (1, 1)).save(media / "speck.png")
    dit = models / "diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors"
    (media / "cut.safetensors").write_bytes(dit.open("rb").read(200_000))
    (media / "garbage.safetensors").write_bytes(b"\xff" * 64)
    (media / "page.safetensors").write_text("<!DOCTYPE html><html>sign in</html>")
    (media / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    (media / "notes.txt").write_text("not weights")
    write_sparse(media / "lora.safetensors", LORA)
    write_sparse(media / "style.safetensors", {**LORA, **LORA_UP})
    write_sparse(media / "style_high_noise.safetensors", {**LORA, **LORA_UP})
    renamed = {name.replace("blocks.1.self_attn", "blocks.1.selfattn"): shape for name, shape in LORA.items()}
    write_sparse(media / "renamed.safetensors", {**renamed, **LORA_UP})
    write_sparse(media / "flux_lora.safetensors", FLUX_LORA)
    write_sparse(media / "flux.safetensors", manifest("flux1_dev"))
    write_sparse(media / "vace.safetensors", manifest("wan2.1_vace_1.3B"))
    short = {name: shape for name, shape in manifest("wan2.1_t2v_1.3B").items() if "blocks.7.norm3" not in name}
    write_sparse(media / "holes.safetensors", short)
    whole = manifest("wan2.1_t2v_1.3B")
    write_sparse(media / "fp8.safetensors", whole, "F8_E4M3")
    write_sparse(media / "int8.safetensors", whole, "I8")
    write_sparse(media / "nvfp4.safetensors", {**whole, "blocks.0.ffn.0.weight_scale_2": (1,)})
    write_sparse(media / "marked.safetensors", {**whole, "scaled_fp8": (2,)})
    (media / "cut.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0]) + bytes(4))
    (media / "old.gguf").write_bytes(b"GGUF" + bytes([1, 0, 0, 0]) + bytes(40))
    (media / "nothing").mkdir()
    (media / "bare").mkdir()
    (media / "bare/dit.safetensors").symlink_to(dit)
    (media / "alone").mkdir()
    (media / "alone/umt5.safetensors").symlink_to(models / "text_encoders/umt5_xxl_fp16.safetensors")
    (media / "empty.txt").write_text("# only a comment\n")
    (media / "latin.txt").write_bytes(b"un caf\xe9\n")
    (media / "prompts.docx").write_bytes(b"PK\x03\x04")
    (media / "bad.csv").write_text("prompt,stepz\na cat,3\n")


T2V = "--model wan2.1-t2v-1.3b"
T14 = "--model wan2.1-t2v-14b"
TWO = "--model wan2.2-t2v-a14b"
I2V = "--model wan2.2-i2v-a14b"
CLIP = "--model wan2.1-i2v-14b-720p"
FLF = "--model wan2.1-flf2v-14b"
TI2V = "--model wan2.2-ti2v-5b"
VACE = "--model wan2.1-vace-1.3b"
CONTROL = "--model wan2.2-fun-control-a14b"
CAMERA = "--model wan2.2-fun-camera-a14b"
REQUEST, CATALOG, CHECKPOINT, MACHINE = "RequestError", "CatalogError", "CheckpointError", "MachineError"
CODES = {REQUEST: 2, CATALOG: 3, CHECKPOINT: 4, MACHINE: 5}

# name: (words of the command, class of the error, what message and hint must hold). M and D are folders.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    # shape
    "frames not 4n+1": (f"cat {T2V} --frames 80", REQUEST, ("80", "4n+1", "77", "81", "--frames 81")),
    "frames even and small": (f"cat {T2V} --frames 2", REQUEST, ("2", "4n+1", "1", "--frames")),
    "frames 0": (f"cat {T2V} --frames 0", REQUEST, ("frames 0", "below 1", "--frames 1")),
    "frames negative": (f"cat {T2V} --frames -5", REQUEST, ("-5", "--frames 1")),
    "frames no number": (f"cat {T2V} --frames many", REQUEST, ("'many'", "whole number")),
    "frames a fraction": (f"cat {T2V} --frames 80.5", REQUEST, ("80.5", "whole number")),
    "frames and seconds": (f"cat {T2V} --frames 81 --seconds 5", REQUEST, ("81", "5", "--seconds")),
    "seconds 0": (f"cat {T2V} --seconds 0", REQUEST, ("0", "--seconds")),
    "seconds not finite": (f"cat {T2V} --seconds inf", REQUEST, ("inf", "finite")),
    "one frame from an image": (f"cat {I2V} --first D/cat.png --frames 1", REQUEST, ("1", "5")),
    "size that does not divide": (f"cat {T2V} --size 830x480", REQUEST, ("830x480", "16", "--size 832x480")),
    "size of another stride": (f"cat {TI2V} --size 1280x720", REQUEST, ("1280x720", "32", "1280x704")),
    "size of one number": (f"cat {T2V} --size 832", REQUEST, ("'832'", "WIDTHxHEIGHT", "832x480")),
    "size unknown name": (f"cat {T2V} --size 1080p", REQUEST, ("'1080p'", "480p", "720p")),
    "size 0": (f"cat {T2V} --size 0x480", REQUEST, ("'0x480'", "WIDTHxHEIGHT")),
    "fps 0": (f"cat {T2V} --fps 0", REQUEST, ("0", "above 0")),
    "fps too high": (f"cat {T2V} --fps 1000", REQUEST, ("1000", "240")),
    # what the model takes
    "image for a text model": (
        f"cat {T2V} --first D/cat.png",
        REQUEST,
        ("cat.png", "it takes --video", "wan2.2-i2v-a14b"),
    ),
    "no image for an image model": (f"cat {I2V}", REQUEST, ("needs an image", "--first IMAGE")),
    "no image for a CLIP model": (f"cat {CLIP}", REQUEST, ("needs an image", "--first IMAGE")),
    "no last image": (f"cat {FLF} --first D/cat.png", REQUEST, ("last frame", "--last IMAGE")),
    "last without first": (f"cat {FLF} --last D/cat.png", REQUEST, ("frame 0", "both ends", "--first IMAGE")),
    "motion for a model without": (
        f"cat {I2V} --first D/cat.png --motion-bucket-id 5",
        REQUEST,
        ("no motion controller",),
    ),
    "motion beyond 100": (f"cat {T2V} --motion-bucket-id 101", REQUEST, ("101 is above 100", "--motion-bucket-id 100")),
    "motion in words": (f"cat {T2V} --motion-bucket-id fast", REQUEST, ("'fast' is not a whole number",)),
    "last for TI2V": (f"cat {TI2V} --first D/cat.png --last D/cat.png", REQUEST, ("cat.png", "--first")),
    "control": (f"cat {T2V} --control D/clip.mp4", REQUEST, ("clip.mp4", "takes no control", "--video")),
    "audio": (f"cat {I2V} --first D/cat.png --audio D/a.wav", REQUEST, ("a.wav", "takes no audio", "--first")),
    "reference": (f"cat {T2V} --reference D/cat.png", REQUEST, ("cat.png", "takes no reference")),
    "mask": (f"cat {T2V} --mask D/cat.png", REQUEST, ("cat.png", "takes no mask")),
    "pose": (f"cat {T2V} --pose D/clip.mp4", REQUEST, ("clip.mp4", "takes no pose")),
    "face": (f"cat {T2V} --face D/clip.mp4", REQUEST, ("clip.mp4", "takes no face")),
    "background": (f"cat {T2V} --background D/clip.mp4", REQUEST, ("clip.mp4", "takes no background")),
    "camera": (f"cat {T2V} --camera pan-left", REQUEST, ("pan-left", "takes no camera")),
    "video": (f"cat {CLIP} --first D/cat.png --video D/clip.mp4", REQUEST, ("clip.mp4", "takes no video")),
    "strength without a video": (f"cat {T2V} --strength 0.5", REQUEST, ("0.5", "--video VIDEO")),
    "strength 0": (f"cat {T2V} --strength 0 --video D/clip.mp4", REQUEST, ("0", "above 0")),
    "strength above 1": (f"cat {T2V} --strength 1.5 --video D/clip.mp4", REQUEST, ("1.5", "1")),
    "strength that leaves no step": (
        f"cat {T2V} --strength 0.01 --steps 10 --video D/cat.png",
        REQUEST,
        ("0.01", "none to run", "--strength 0.1"),
    ),
    "middle out of the video": (f"cat {I2V} --middle D/cat.png@200", REQUEST, ("frame 200", "1 to 79")),
    "one-frame inference": (f"cat {T2V} --one-frame target_index=1", REQUEST, ("target_index=1", "takes no one frame")),
    "guidance-high on one expert": (f"cat {T2V} --guidance-high 4", REQUEST, ("4", "one expert", "wan2.2-t2v-a14b")),
    "dit-high on one expert": (
        f"cat {T2V} --dit-high M/diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors",
        REQUEST,
        ("wan2.2_t2v_high_noise", "one expert", "two-expert"),
    ),
    "boundary on one expert": (f"cat {T2V} --boundary 0.9", REQUEST, ("0.9", "one expert", "two-expert")),
    # input media
    "image that is not there": (f"cat {I2V} --first D/dog.png", REQUEST, ("dog.png", "no such file", "cat.png")),
    "image cut short": (f"cat {I2V} --first D/cut.png", REQUEST, ("cut.png",)),
    "image empty": (f"cat {I2V} --first D/empty.png", REQUEST, ("empty.png",)),
    "text named as an image": (f"cat {I2V} --first D/text.png", REQUEST, ("text.png",)),
    "video as an image": (f"cat {I2V} --first D/clip.mp4", REQUEST, ("clip.mp4",)),
    "folder as an image": (f"cat {I2V} --first D/folder.png", REQUEST, ("folder.png",)),
    "last image corrupt": (f"cat {FLF} --first D/cat.png --last D/cut.png", REQUEST, ("cut.png",)),
    # sampling
    "steps 0": (f"cat {T2V} --steps 0", REQUEST, ("0", "--steps 1")),
    "steps too many": (f"cat {T2V} --steps 5000", REQUEST, ("5000", "1000")),
    "steps no number": (f"cat {T2V} --steps twenty", REQUEST, ("'twenty'", "whole number")),
    "solver unknown": (f"cat {T2V} --solver unipcc", REQUEST, ("'unipcc'", "unipc, dpmpp, euler", "--solver unipc")),
    "solver of another program": (f"cat {T2V} --solver ddim", REQUEST, ("'ddim'", "unipc, dpmpp, euler")),
    "shift 0": (f"cat {T2V} --shift 0", REQUEST, ("0", "above 0")),
    "shift not a number": (f"cat {T2V} --shift nan", REQUEST, ("nan", "finite")),
    "guidance negative": (f"cat {T2V} --guidance -1", REQUEST, ("-1", "--guidance 0")),
    "boundary above 1": (f"cat {TWO} --boundary 875", REQUEST, ("875", "--boundary 1")),
    "seed negative": (f"cat {T2V} --seed -1", REQUEST, ("-1", "--seed 0")),
    "seed too large": (
        f"cat {T2V} --seed 9223372036854775808",
        REQUEST,
        ("9223372036854775808", "9223372036854775807"),
    ),
    "seed no number": (f"cat {T2V} --seed random", REQUEST, ("'random'", "whole number")),
    "seeds with a word": (f"cat {T2V} --seeds 1,two", REQUEST, ("'two'", "whole number")),
    "seeds negative": (f"cat {T2V} --seeds 1,-2", REQUEST, ("-2", "0")),
    "seeds twice the same": (f"cat {T2V} --seeds 4,4", REQUEST, ("4", "twice")),
    "seeds and count": (f"cat {T2V} --seeds 1,2 --count 3", REQUEST, ("1,2", "--count")),
    "seeds and seed": (f"cat {T2V} --seeds 1,2 --seed 3", REQUEST, ("1,2", "--seed")),
    "seeds beyond the last": (f"cat {T2V} --seed 9223372036854775807 --count 2", REQUEST, ("9223372036854775807", "2")),
    "count 0": (f"cat {T2V} --count 0", REQUEST, ("0", "--count 1")),
    "precision unknown": (f"cat {T2V} --precision fp8", REQUEST, ("'fp8'", "fast, reference")),
    "device unknown": (f"cat {T2V} --device gpu", REQUEST, ("gpu", "cuda", "cpu")),
    "device that is not there": (f"cat {T2V} --device cuda:31", MACHINE, ("cuda:31",)),
    "tile that does not divide": (f"cat {T2V} --tile 250", REQUEST, ("250", "16", "256")),
    "tile too small": (f"cat {T2V} --tile 16", REQUEST, ("16", "--tile 64")),
    "chunk 0": (f"cat {T2V} --chunk 0", REQUEST, ("0", "--chunk 1")),
    "vram no amount": (f"cat {T2V} --vram much", REQUEST, ("'much'", "12GB", "--vram")),
    "vram in bytes": (f"cat {T2V} --vram 16000000000", REQUEST, ("16000000000", "12GB", "--vram")),
    "vram 0": (f"cat {T2V} --vram 0GB", REQUEST, ("0", "--vram 1")),
    "vram on a CPU": (f"cat {T2V} --device cpu --vram 12GB", REQUEST, ("12 GB", "CPU", "--ram 12GB")),
    "more blocks than there are": (f"cat {T2V} --device cpu --blocks-to-swap 31", REQUEST, ("31", "30 blocks")),
    "blocks negative": (f"cat {T2V} --blocks-to-swap -1", REQUEST, ("-1", "--blocks-to-swap 0")),
    "text encoder on nothing": (f"cat {T2V} --text-encoder-on gpu", REQUEST, ("'gpu'", "device, streamed, cpu")),
    "VAE cache beside a CPU": (f"cat {T2V} --device cpu --vae-cache cpu", REQUEST, ("cpu", "--tile")),
    "ffn tokens 0": (f"cat {T2V} --ffn-tokens 0", REQUEST, ("0", "--ffn-tokens 1")),
    "dtype unknown": (f"cat {T2V} --dtype fp8", REQUEST, ("'fp8'", "float32, bfloat16, float16")),
    "save steps negative": (f"cat {T2V} --save-steps -1", REQUEST, ("-1", "--save-steps 0")),
    "memory that is too little": (
        f"cat {T2V} --device cpu --ram 700MB",
        MACHINE,
        ("needs about", "--ram allows 0.7 GB"),
    ),
    "two faults at once": (f"cat {T2V} --steps 0 --fps 0", REQUEST, ("steps 0", "fps 0", "--steps 1")),
    # prompts
    "no prompt": (T2V, REQUEST, ("no prompt", "kinema generate")),
    "empty prompt": (f"'' {T2V}", REQUEST, ("no prompt", "kinema generate")),
    "blank prompt": (f"'  ' {T2V}", REQUEST, ("no prompt", "kinema generate")),
    # models and files
    "no model": ("cat", REQUEST, ("no model", "--model NAME", "--dit")),
    "model unknown": ("cat --model wan2.1-t2v-1.3", CATALOG, ("'wan2.1-t2v-1.3'", "wan2.1-t2v-1.3b")),
    "model of a family that is not there": ("cat --model hunyuan", CATALOG, ("'hunyuan'", "wan2.1-t2v-14b")),
    "model empty": ("cat --model ''", REQUEST, ("model is empty", "--model")),
    "folder that is not there": ("cat --model D/nowhere", CATALOG, ("nowhere", "no such folder", "cat.png")),
    "folder without models": ("cat --model D/nothing", CATALOG, ("--dit",)),
    "folder with a DiT alone": (f"cat {T2V} --model D/bare", REQUEST, ("--model", "multiple")),
    "folder that lacks its VAE": ("cat --model D/bare", CATALOG, ("vae", "--vae FILE")),
    "file that is not there": (f"cat {T2V} --vae D/vae.safetensors", CATALOG, ("vae.safetensors", "no such file")),
    "model not installed": ("cat --model wan2.1-i2v-14b-480p --first D/cat.png", CATALOG, ("480p", "dit", "--dit")),
    "expert missing": (
        "cat --dit M/diffusion_models/wan2.2_i2v_low_noise_14B_fp16.safetensors --first D/cat.png "
        "--vae M/vae/wan_2.1_vae.safetensors --text-encoder M/text_encoders/umt5_xxl_fp16.safetensors",
        CATALOG,
        ("wan2.2_i2v_low_noise", "wan2.2-i2v-a14b", "the other one", "--dit-high HIGH_NOISE_FILE"),
    ),
    "role that the file does not tell": (
        "cat --dit M/diffusion_models/wan2.1_t2v_14B_fp16.safetensors "
        "--vae M/vae/wan_2.1_vae.safetensors --text-encoder M/text_encoders/umt5_xxl_fp16.safetensors",
        REQUEST,
        ("wan2.1_t2v_14B_fp16", "--model wan2.1-t2v-14b", "wan2.2-t2v-a14b"),
    ),
    "experts of one of two models": (
        "cat --dit M/diffusion_models/wan2.2_i2v_low_noise_14B_fp16.safetensors --first D/cat.png "
        "--dit-high M/diffusion_models/wan2.2_i2v_high_noise_14B_fp16.safetensors "
        "--vae M/vae/wan_2.1_vae.safetensors --text-encoder M/text_encoders/umt5_xxl_fp16.safetensors",
        REQUEST,
        ("wan2.2_i2v_low_noise", "--model wan2.2-i2v-a14b", "wan2.2-fun-inp-a14b"),
    ),
    "two files for a model of one": (
        "cat --dit M/diffusion_models/wan2.2_ti2v_5B_fp16.safetensors "
        "--dit-high M/diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors "
        "--vae M/vae/wan2.2_vae.safetensors --text-encoder M/text_encoders/umt5_xxl_fp16.safetensors",
        REQUEST,
        ("wan2.2-ti2v-5b has one expert", "--dit-high", "leave it out"),
    ),
    "experts exchanged": (
        f"cat {TWO} --dit M/diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors "
        "--dit-high M/diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors",
        REQUEST,
        ("high_noise", "swap", "--dit-high"),
    ),
    "one file for both experts": (
        f"cat {TWO} --dit-high M/diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors",
        REQUEST,
        ("wan2.2_t2v_low_noise", "same file", "--dit-high"),
    ),
    "expert of another model": (
        f"cat {TWO} --dit M/diffusion_models/wan2.2_i2v_low_noise_14B_fp16.safetensors",
        CHECKPOINT,
        ("wan2.2_i2v_low_noise", "in_channels is 36", "16", "wan2.2-t2v-a14b"),
    ),
    "DiT of another size": (
        f"cat {T14} --dit M/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
        CHECKPOINT,
        ("wan2.1_t2v_1.3B_fp16", "1536", "5120", "--model"),
    ),
    "VAE as DiT": (f"cat {T2V} --dit M/vae/wan_2.1_vae.safetensors", REQUEST, ("wan_2.1_vae", "--vae", "--dit")),
    "DiT as VAE": (
        f"cat {T2V} --vae M/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors",
        REQUEST,
        ("wan2.1_t2v_1.3B", "--dit", "--vae"),
    ),
    "CLIP as text encoder": (
        f"cat {T2V} --text-encoder M/clip_vision/clip_vision_h.safetensors",
        REQUEST,
        ("clip_vision_h", "--clip-vision", "--text-encoder"),
    ),
    "VAE of the other generation": (
        f"cat {T2V} --vae M/vae/wan2.2_vae.safetensors",
        CHECKPOINT,
        ("wan2.2_vae", "48", "16", "--vae"),
    ),
    "old VAE for TI2V": (f"cat {TI2V} --vae M/vae/wan_2.1_vae.safetensors", CHECKPOINT, ("wan_2.1_vae", "16", "48")),
    "DiT cut short": (f"cat {T2V} --dit D/cut.safetensors", CHECKPOINT, ("cut.safetensors",)),
    "DiT of garbage": (f"cat {T2V} --dit D/garbage.safetensors", CHECKPOINT, ("garbage.safetensors",)),
    "DiT is a web page": (f"cat {T2V} --dit D/page.safetensors", CHECKPOINT, ("page.safetensors",)),
    "DiT is a pointer": (f"cat {T2V} --dit D/pointer.safetensors", CHECKPOINT, ("pointer.safetensors",)),
    "DiT is a text": (f"cat {T2V} --dit D/notes.txt", CHECKPOINT, ("notes.txt",)),
    "DiT with missing tensors": (
        f"cat {T2V} --dit D/holes.safetensors",
        CHECKPOINT,
        ("holes.safetensors", "blocks.7.norm3"),
    ),
    "LoRA with a renamed key": (
        f"cat {T14} --lora D/renamed.safetensors",
        REQUEST,
        ("renamed.safetensors", "1 of 3 parts", "blocks.1.self", "allow=unmatched"),
    ),
    "LoRA of another width": (f"cat {T2V} --lora D/style.safetensors", REQUEST, ("style.safetensors", "[1536, 1536]")),
    "LoRA for FLUX": (f"cat {T14} --lora D/flux_lora.safetensors", REQUEST, ("flux_lora.safetensors", "FLUX", "Wan")),
    "high-noise LoRA on the low expert": (
        f"cat {TWO} --lora D/style_high_noise.safetensors@low",
        REQUEST,
        ("high-noise", "low-noise", "@high", "allow=expert"),
    ),
    "high-noise LoRA on one expert": (
        f"cat {T14} --lora D/style_high_noise.safetensors",
        REQUEST,
        ("high-noise", "one expert", "allow=expert"),
    ),
    "LoRA that is not there": (f"cat {T14} --lora D/lost.safetensors:0.8", CATALOG, ("lost.safetensors", "STRENGTH")),
    "LoRA with a strength of letters": (f"cat {T14} --lora D/style.safetensors:O.8", CATALOG, (":O.8", "STRENGTH")),
    "LoRA that is a model": (f"cat {T14} --lora D/holes.safetensors", CHECKPOINT, ("holes.safetensors", "no LoRA")),
    "LoRA that is cut": (f"cat {T14} --lora D/cut.safetensors", CHECKPOINT, ("cut.safetensors", "truncated")),
    "LoRA steps backwards": (f"cat {T14} --lora D/style.safetensors,steps=3-1", REQUEST, ("3-1", "first step is 1")),
    "LoRA steps beyond the last": (
        f"cat {T14} --steps 4 --lora D/style.safetensors,steps=3-9",
        REQUEST,
        ("3-9", "there are 4", "steps=3-4"),
    ),
    "LoRA pattern of nothing": (f"cat {T14} --lora D/style.safetensors,only=head", REQUEST, ("only=head", "blocks.0")),
    "LoRA fused at some steps": (
        f"cat {T14} --lora-mode fuse --lora D/style.safetensors,steps=1-3",
        REQUEST,
        ("fused", "--lora-mode branch"),
    ),
    "LoRA mode unknown": (f"cat {T14} --lora-mode melt", REQUEST, ("'melt'", "branch", "fuse")),
    "preset unknown": (f"cat {T14} --preset turbo", REQUEST, ("'turbo'", "causvid", "none")),
    "preset of another model": (f"cat {T14} --preset fastwan-ti2v-5b", REQUEST, ("fastwan-ti2v-5b", "wan2.2-ti2v-5b")),
    "LoRA as a model": (f"cat {T2V} --dit D/lora.safetensors", CHECKPOINT, ("lora.safetensors", "LoRA", "--lora")),
    "FLUX as a Wan model": (f"cat {T2V} --dit D/flux.safetensors", CHECKPOINT, ("flux.safetensors", "FLUX")),
    "the DiT of another variant": (f"cat {T2V} --dit D/vace.safetensors", CHECKPOINT, ("vace.safetensors", "VACE")),
    "folder instead of a file": (f"cat {T2V} --vae D/nothing", CHECKPOINT, ("nothing", ".safetensors")),
    "tokenizer that is none": (f"cat {T2V} --tokenizer D/notes.txt", CATALOG, ("notes.txt", "spiece.model")),
    "no tokenizer anywhere": (
        f"cat {T2V} --dit M/diffusion_models/wan2.1_t2v_1.3B_fp16.safetensors --vae M/vae/wan_2.1_vae.safetensors "
        "--text-encoder D/alone/umt5.safetensors --models-dir D/nothing",
        CATALOG,
        ("umt5.safetensors holds no tokenizer", "google/umt5-xxl", "Wan-AI/Wan2.1-T2V-1.3B", "--tokenizer PATH"),
    ),
    "tokenizer that is not there": (f"cat {T2V} --tokenizer D/spiece", CATALOG, ("spiece", "no such file")),
    # quantised files
    "fp8 rounded again": (
        f"cat {T2V} --dit D/fp8.safetensors --quantise int8",
        REQUEST,
        ("fp8.safetensors", "quantised already", "leave --quantise out"),
    ),
    "int8 without scales": (f"cat {T2V} --dit D/int8.safetensors", CHECKPOINT, ("int8 without a scale", "GGUF")),
    "nvfp4": (f"cat {T2V} --dit D/nvfp4.safetensors", CHECKPOINT, ("nvfp4", "weight_scale_2")),
    "a marker of fp8 without fp8": (f"cat {T2V} --dit D/marked.safetensors", CHECKPOINT, ("scaled_fp8", "without any")),
    "GGUF that is cut": (f"cat {T2V} --dit D/cut.gguf", CHECKPOINT, ("cut.gguf", "truncated")),
    "GGUF of an old version": (f"cat {T2V} --dit D/old.gguf", CHECKPOINT, ("GGUF version 1", "2 and 3")),
    "quantise unknown": (f"cat {T2V} --quantise fp4", REQUEST, ("'fp4'", "fp8, fp8-64, int8")),
    "fp8 multiplication on a CPU": (
        f"cat {T2V} --device cpu --quantise fp8 --fp8-matmul yes",
        MACHINE,
        ("does not multiply fp8", "leave --fp8-matmul out"),
    ),
    # control, masks, camera
    "control for a text model": (f"cat {T2V} --control D/film.mp4", REQUEST, ("takes no control", "wan2.1-vace-14b")),
    "control that is missing": (f"cat {CONTROL}", REQUEST, ("wan2.2-fun-control-a14b needs", "--control")),
    "control that ends early": (
        f"cat {CONTROL} --control D/film.mp4 --frames 81",
        REQUEST,
        ("film.mp4", "5 frames", "81", "--frames 5"),
    ),
    "control that is no video": (f"cat {VACE} --control D/clip.mp4", REQUEST, ("clip.mp4",)),
    "control that is not there": (f"cat {VACE} --control D/fild.mp4", REQUEST, ("fild.mp4", "no such file")),
    "control scale for a text model": (f"cat {T2V} --control-scale 0.5", REQUEST, ("--control-scale 0.5", "VACE")),
    "control scale too large": (f"cat {VACE} --control-scale 11", REQUEST, ("11", "--control-scale 10")),
    "mask alone": (f"cat {VACE} --mask D/cat.png", REQUEST, ("masks nothing", "--video VIDEO")),
    "mask of another shape": (
        f"cat {VACE} --video D/film.mp4 --mask D/tall.png",
        REQUEST,
        ("tall.png", "32x64", "64x32"),
    ),
    "mask that ends early": (
        f"cat {VACE} --video D/film.mp4 --mask D/short.mp4 --frames 5",
        REQUEST,
        ("short.mp4", "2 frames", "5", "one image for all frames"),
    ),
    "video with nothing left to make": (
        f"cat {VACE} --video D/film.mp4 --frames 5",
        REQUEST,
        ("film.mp4", "nothing is left to make", "--mask", "--outpaint", "--frames 9"),
    ),
    "outpaint nothing": (f"cat {VACE} --outpaint", REQUEST, ("no video was given", "--video VIDEO")),
    "two references for one": (
        f"cat {CONTROL} --control D/film.mp4 --reference D/cat.png --reference D/tall.png",
        REQUEST,
        ("one reference image, got 2", "VACE"),
    ),
    "camera that is missing": (f"cat {CAMERA} --first D/cat.png", REQUEST, ("needs a camera move", '"pan left"')),
    "camera that is no move": (f"cat {CAMERA} --camera 'fly away'", REQUEST, ("'fly away' is no move", "dolly")),
    "camera for a text model": (f"cat {T2V} --camera static", REQUEST, ("takes no camera", "wan2.2-fun-camera-a14b")),
    # outputs
    "output kind unknown": (f"cat {T2V} --output avi", REQUEST, ("'avi'", "mp4, webm, gif, webp, png, latents")),
    "output kind near": (f"cat {T2V} --output mp5", REQUEST, ("'mp5'", "--output mp4")),
    "output kind twice": (f"cat {T2V} --output mp4,mp4", REQUEST, ("mp4,mp4", "once")),
    "save of an unknown kind": (f"cat {T2V} -o film.avi", REQUEST, ("film.avi", ".mp4", "film.mp4")),
    "save and output disagree": (f"cat {T2V} -o film.mp4 --output gif", REQUEST, ("film.mp4", "gif", "--output mp4")),
    "save over a file": (f"cat {T2V} -o D/there.mp4", REQUEST, ("there.mp4", "exists", "--overwrite")),
    "save under a file": (f"cat {T2V} -o D/there.mp4/film.mp4", REQUEST, ("there.mp4", "not a folder", "--save")),
    "save onto a folder": (f"cat {T2V} -o D/folder.mp4", REQUEST, ("folder.mp4", "is a folder", "--save")),
    "quality too high": (f"cat {T2V} --quality 101", REQUEST, ("101", "--quality 100")),
    "quality negative": (f"cat {T2V} --quality -1", REQUEST, ("-1", "--quality 0")),
    "preview onto a folder": (f"cat {T2V} --preview D/folder.png", REQUEST, ("folder.png", "is a folder", "--preview")),
    "preview under a file": (
        f"cat {T2V} --preview D/there.mp4/live.png",
        REQUEST,
        ("there.mp4", "not a folder", "--preview"),
    ),
    "preview no picture": (f"cat {T2V} --preview live.mp4", REQUEST, ("live.mp4", ".png")),
    "overwrite takes no word": (f"cat {T2V} --overwrite=maybe", REQUEST, ("maybe",)),
    # prompt files
    "prompt file that is not there": (
        f"--from-file D/prompt.txt {T2V}",
        REQUEST,
        ("prompt.txt", "does not exist", "did you mean"),
    ),
    "prompt file of another kind": (f"--from-file D/prompts.docx {T2V}", REQUEST, (".docx", ".txt", ".csv")),
    "prompt file without lines": (f"--from-file D/empty.txt {T2V}", REQUEST, ("empty.txt", "no requests")),
    "prompt file not UTF-8": (f"--from-file D/latin.txt {T2V}", REQUEST, ("latin.txt", "UTF-8", "0xe9")),
    "CSV with an unknown column": (f"--from-file D/bad.csv {T2V}", REQUEST, ("'stepz'", "'steps'")),
    "folder without images": (f"--from-file D/nothing {T2V}", REQUEST, ("nothing", "no images")),
    "one file for a batch": (f"--from-file D/empty.txt {T2V} -o one.mp4", REQUEST, ("one.mp4", "--save one")),
    # settings
    "configuration that is not there": (f"cat {T2V} --config D/none.toml", REQUEST, ("none.toml", "--config")),
    "configuration that is a folder": (f"cat {T2V} --config D/nothing", REQUEST, ("nothing", "folder")),
    "models folder that is not there": (f"cat {T2V} --models-dir D/none", REQUEST, ("none", "--model")),
    "catalog that is not there": (f"cat {T2V} --catalog D/none.toml", REQUEST, ("none.toml",)),
    "catalog that is none": (f"cat {T2V} --catalog D/notes.txt", CATALOG, ("notes.txt", "TOML")),
    "unknown flag": (f"cat {T2V} --negativ blurry", REQUEST, ("--negativ", "--negative")),
    "unknown value": (f"cat {T2V} --seed", REQUEST, ("--seed", "argument")),
}


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.fixture
def installed(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> Cli:
    def loaded(ref: object, fused: object) -> None:
        raise AssertionError(f"a weight was loaded: {ref}")

    monkeypatch.setattr(kinema.residents, "load", loaded)
    monkeypatch.setenv("KINEMA_MODELS", str(world.models))
    monkeypatch.setenv("KINEMA_DEVICE", "cpu")
    return cli


def words_of(line: str, world: World) -> list[str]:
    places = {"M/": f"{world.models}/", "D/": f"{world.media}/"}
    return [
        next((place + word[2:] for key, place in places.items() if word.startswith(key)), word)
        for word in shlex.split(line)
    ]


@pytest.mark.parametrize("case", CASES)
def test_bad_input(installed: Cli, world: World, case: str):
    line, kind, words = CASES[case]
    ran = installed("generate", *words_of(line, world), "--json")
    assert (ran.error["error"], ran.code) == (kind, CODES[kind]), ran.error
    told = f"{ran.error['message']}\n{ran.error['hint']}"
    assert [word for word in words if word not in told] == [], told
    assert ran.error["hint"], "every error says what to type"
    assert list(Path().iterdir()) == [], "nothing is written"


PAIR = (
    "cat --dit M/diffusion_models/wan2.2_t2v_low_noise_14B_fp16.safetensors "
    "--dit-high M/diffusion_models/wan2.2_t2v_high_noise_14B_fp16.safetensors "
    "--vae M/vae/wan_2.1_vae.safetensors --text-encoder M/text_encoders/umt5_xxl_fp16.safetensors"
)


@pytest.mark.parametrize("line", [f"cat {T2V}", f"cat {T2V} --size 832x480 --frames 81 --output mp4,latents", PAIR])
def test_the_same_without_the_fault_is_planned(installed: Cli, world: World, line: str):
    ran = installed("plan", *words_of(line, world))
    assert ran.code == 0, ran.err


def test_the_trap_catches_a_load(installed: Cli, world: World):
    with pytest.raises(AssertionError, match="a weight was loaded"):
        installed("generate", *words_of(f"cat {T2V}", world))


def test_a_full_disk(installed: Cli, world: World, monkeypatch: pytest.MonkeyPatch):
    usage = type(shutil.disk_usage("."))(10**12, 10**12 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    ran = installed("generate", *words_of(f"cat {T2V}", world), "--json")
    assert ran.error["error"] == MACHINE and "outputs" in ran.error["message"] and "--save" in ran.error["hint"]


def test_a_folder_that_cannot_be_written(installed: Cli, world: World, monkeypatch: pytest.MonkeyPatch):
    # Permissions do not bind root, so the answer of the system is put in its place.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    ran = installed("generate", *words_of(f"cat {T2V}", world), "--json")
    assert (
        ran.error["error"] == REQUEST and "cannot be written" in ran.error["message"] and "--save" in ran.error["hint"]
    )
