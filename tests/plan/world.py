"""A world to plan in without files: facts of full-size models, images and machines, as the survey would find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kinema.catalog import load_catalog
from kinema.planning import make_plan
from kinema.schema import CatalogEntry, Facts, FileFacts, Machine, MediaFacts, Plan, Request

CATALOG = load_catalog()
MACHINE = Machine(
    device="cuda", name="Card", memory_total=141_000_000_000, memory_free=140_000_000_000, ram_total=128_000_000_000,
    ram_free=120_000_000_000, cores=16,
)  # fmt: skip
FFN = {256: 1024, 1536: 8960, 3072: 14336, 5120: 13824}
VAE_CONFIG: dict[str, dict[str, Any]] = {
    "wan2.1": {"version": "2.1", "dim": 96, "dec_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
               "temporal_downsample": [False, True, True]},
    "wan2.2": {"version": "2.2", "dim": 160, "dec_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
               "temporal_downsample": [False, True, True]},
}  # fmt: skip
FLUX = {"mlp_dim": 12288, "num_double": 19, "num_single": 38, "text_dim": 4096, "vector_dim": 768, "head_dim": 128}
FLUX_AE = {"dim": 128, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 16}
CLIP_L = {"vocab": 49408, "num_positions": 77, "dim": 768, "mlp_dim": 3072, "num_layers": 12}
SIGLIP = {"image_size": 384, "patch_size": 14, "dim": 1152, "mlp_dim": 4304, "num_layers": 27}
UMT5 = {"vocab": 256384, "dim": 4096, "dim_attn": 4096, "num_heads": 64, "ffn_dim": 10240, "num_layers": 24}
S2V = {
    "layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39], "audio_dim": 1024, "audio_layers": 25, "num_tokens": 4,
    "pose_channels": 16,
}  # fmt: skip
WAV2VEC2 = {"dim": 1024, "num_layers": 24, "ffn_dim": 4096}
CLIP = {"image_size": 224, "patch_size": 14, "dim": 1280, "num_heads": 16, "num_layers": 32, "mlp_ratio": 4}


def file(role: str, component: str, config: dict[str, Any], bytes: int = 1_000_000_000) -> FileFacts:
    path = Path(f"/models/{role}.safetensors")
    return FileFacts(
        path=path, files=(path,), bytes=bytes, container="safetensors", component=component, dialect="official",
        dtype="bfloat16", tensors=10, parameters=bytes // 2, config=config, structure=f"a {component}",
    )  # fmt: skip


def flux_files_of(entry: CatalogEntry) -> dict[str, FileFacts]:
    found = {
        "dit": file("flux", "flux_dit", {**FLUX, **entry.structure}, 23_800_000_000),
        "vae": file("ae", "flux_vae", FLUX_AE, 335_000_000),
        "text_encoder": file("t5xxl", "t5", {**UMT5, "vocab": 32128, "shared_bias": True}, 9_790_000_000),
        "clip_text": file("clip_l", "clip_text", CLIP_L, 246_000_000),
    }
    if entry.redux:
        found["clip_vision"] = file("siglip", "siglip", SIGLIP)
        found["redux"] = file("redux", "redux", {"image_dim": 1152, "hidden_dim": 12288, "text_dim": 4096})
    return found


def adapters_of(entry: CatalogEntry) -> dict[str, Any]:
    """What a header says of the adapters that a model has."""
    every = entry.structure["num_layers"] // (15 if entry.structure["dim"] == 1536 else 8)
    known: dict[str, dict[str, Any]] = {
        "vace": {"layers": list(range(0, entry.structure["num_layers"], every)), "in_channels": 96},
        "camera": {"in_channels": 24, "downscale": 16 if entry.vae == "wan2.2" else 8},
        "reference": {"in_channels": 48 if entry.vae == "wan2.2" else 16},
        "animate": {"channels": [32, 64, 128, 256, 512, 512, 512, 512], "motion_width": 512, "motion_dim": 20,
                    "face_width": 1024, "face_heads": 4, "interval": 5, "pose_channels": 16},
    }  # fmt: skip
    return {name: config for name, config in known.items() if entry.structure.get(name)}


def files_of(entry: CatalogEntry) -> dict[str, FileFacts]:
    if entry.family == "flux":
        return flux_files_of(entry)
    dim = entry.structure["dim"]
    dit = {
        "num_layers": 30, "text_dim": 4096, "freq_dim": 256, "num_clip_positions": 0, "clip_dim": 1280,
        "head_dim": 128, "ffn_dim": FFN[dim], **entry.structure, **adapters_of(entry),
    }  # fmt: skip
    if entry.structure.get("speech"):
        dit["speech"] = S2V
    found = {
        "dit": file("low", "dit", dit, 28_000_000_000),
        "vae": file("vae", "vae", VAE_CONFIG[entry.vae]),
        "text_encoder": file("umt5", "text_encoder", UMT5, 11_400_000_000),
    }
    if "high" in entry.experts:
        found["dit_high"] = file("high", "dit", dit, 28_000_000_000)
    if entry.structure["has_clip_tokens"]:
        found["clip_vision"] = file("clip", "clip_vision", CLIP)
    if entry.structure.get("speech"):
        found["audio_encoder"] = file("wav2vec2", "audio_encoder", WAV2VEC2)
    return found


def sound(seconds: float, name: str = "voice.mp3") -> MediaFacts:
    return MediaFacts(path=Path(f"/in/{name}"), kind="audio", frames=0, seconds=seconds, rate=44_100, channels=2)


def image(width: int, height: int, name: str = "image.png", alpha: bool = False) -> MediaFacts:
    return MediaFacts(path=Path(f"/in/{name}"), kind="image", width=width, height=height, has_alpha=alpha)


def video(
    width: int = 832, height: int = 480, frames: int = 81, fps: float | None = 16, name: str = "video.mp4"
) -> MediaFacts:
    seconds = frames / fps if fps else None
    return MediaFacts(
        path=Path(f"/in/{name}"), kind="video", width=width, height=height, frames=frames, fps=fps, seconds=seconds
    )


def plan(
    model: str, images: dict[str, MediaFacts] | None = None, facts: dict[str, Any] | None = None, **fields: Any
) -> Plan:
    """Plan a request for a catalog model whose files are all there."""
    entry = CATALOG[model]
    images = images or {}
    fields = {"prompt": "a cat walks on grass", "seed": 7, **fields, **{role: m.path for role, m in images.items()}}
    request = Request(model=model, **fields)
    world = {"files": files_of(entry), "media": {role: (m,) for role, m in images.items()}, "machine": MACHINE}
    return make_plan(request, entry, Facts(**{**world, **(facts or {})}))
