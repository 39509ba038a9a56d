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


def files_of(entry: CatalogEntry) -> dict[str, FileFacts]:
    dim = entry.structure["dim"]
    dit = {
        "num_layers": 30, "text_dim": 4096, "freq_dim": 256, "num_clip_positions": 0, "clip_dim": 1280,
        "head_dim": 128, "ffn_dim": FFN[dim], **entry.structure,
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
