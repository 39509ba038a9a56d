"""Which files of a model folder play which role, and where the tokenizer lies.

Knows the layouts of official, diffusers and ComfyUI folders. What a layout leaves open is asked for, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from kinema.errors import CatalogError, CheckpointError
from kinema.weights.files import checkpoints_in
from kinema.weights.keys import components_of
from kinema.weights.quantised.schemes import open_weights

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
"""Diffusers pipelines whose transformer is the high-noise expert and transformer_2 the low-noise one."""

EXPERT_FOLDERS = {"dit_high": "high_noise_model", "dit": "low_noise_model"}
COMFY_FOLDERS = {
    "dit": ("diffusion_models", "unet"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "clip_vision": ("clip_vision",),
    "audio_encoder": ("audio_encoders",),
}
AUDIO_ENCODER_FOLDER = "wav2vec2-large-xlsr-53-english"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "umt5-xxl")
T5_FOLDERS = ("tokenizer_2", "google/t5-v1_1-xxl", "t5-v1_1-xxl", "t5xxl")
CLIP_FOLDERS = ("tokenizer", "openai/clip-vit-large-patch14", "clip-vit-large-patch14", "clip_l")
CLIP_FILES = ("tokenizer.json", "vocab.json")


def resolve_folder(folder: Path, given: Collection[str] = ()) -> dict[str, Path]:
    """Return paths by role: dit, dit_high, vae, text_encoder, clip_vision, audio_encoder, tokenizer; without those that
    have no file.

    given   roles named by hand, which are not looked for and so cannot be ambiguous.
    Raises CatalogError listing the candidates where a role has several, CheckpointError where a role has none and a
    file that may have been it is broken.
    """
    index = folder / "model_index.json"
    if index.is_file():
        roles = _diffusers(folder, _read_index(index), given)
    elif any((folder / name).is_dir() for names in COMFY_FOLDERS.values() for name in names):
        roles = _comfyui(folder, given)
    else:
        roles = _official(folder, given)
    if "clip_text" not in roles:  # FLUX has two tokenizers, found for each encoder apart
        tokenizer = find_tokenizer(roles.get("text_encoder", folder)) or find_tokenizer(folder)
        roles |= {"tokenizer": tokenizer} if tokenizer else {}
    return {role: path for role, path in roles.items() if role not in given}


def find_tokenizer(
    path: Path,
    roots: Sequence[Path] = (),
    names: Sequence[str] = TOKENIZER_FOLDERS,
    files: Sequence[str] = TOKENIZER_FILES,
) -> Path | None:
    """Return a tokenizer: `path` itself if it is one, else beside it, else in one of the folders `roots`.

    names  folders it may lie in; umT5's are the default. files: what it may be called.
    """
    if path.is_file() and path.name in files:
        return path
    beside = path if path.is_dir() else path.parent
    places = [beside, *(beside / name for name in names)]
    if beside.name in ("text_encoder", "text_encoder_2", "text_encoders", "clip"):
        places += [beside.parent / name for name in names]
    for root in roots:
        places += [root / name for name in names]
        places += [root / kind / name for kind in COMFY_FOLDERS["text_encoder"] for name in ("", *names)]
    return next((place / name for place in places for name in files if (place / name).is_file()), None)


# --- layouts ---------------------------------------------------------------------------------------


def _diffusers(folder: Path, index: dict[str, Any], given: Collection[str]) -> dict[str, Path]:
    parts = {name for name, row in index.items() if isinstance(row, list) and row[:1] != [None]}
    present = {name for name in parts if (folder / name).is_dir()}
    names = {"vae": "vae", "text_encoder": "text_encoder", "clip_vision": "image_encoder"}
    if str(index.get("_class_name")).startswith("Flux"):
        names = {"vae": "vae", "text_encoder": "text_encoder_2", "clip_text": "text_encoder"}
    roles = {role: folder / name for role, name in names.items() if name in present}
    if "transformer_2" not in parts and "transformer" in present:
        roles["dit"] = folder / "transformer"
    elif "transformer_2" in parts and index.get("_class_name") in PIPELINES:
        both = {"dit_high": "transformer", "dit": "transformer_2"}
        roles |= {role: folder / name for role, name in both.items() if name in present}
    elif "transformer_2" in parts and "dit" not in given:
        raise _ambiguous(folder, "dit", [folder / "transformer", folder / "transformer_2"])
    return roles


def _official(folder: Path, given: Collection[str]) -> dict[str, Path]:
    """Expert folders are certain; everything else at the top is told by its header."""
    experts = {role: folder / name for role, name in EXPERT_FOLDERS.items() if (folder / name).is_dir()}
    needed = {"vae", "text_encoder", *(() if experts else ("dit",))} - set(given)
    candidates = _by_component(checkpoints_in(folder), needed)
    candidates = {role: paths for role, paths in candidates.items() if role not in given}
    if experts and "dit" in candidates:
        raise _ambiguous(folder, "dit", [*candidates["dit"], *experts.values()])
    audio = folder / AUDIO_ENCODER_FOLDER
    return experts | _single(folder, candidates) | ({"audio_encoder": audio} if audio.is_dir() else {})


def _comfyui(folder: Path, given: Collection[str]) -> dict[str, Path]:
    roles: dict[str, Path] = {}
    for role in COMFY_FOLDERS.keys() - set(given):
        folders = [folder / name for name in COMFY_FOLDERS[role] if (folder / name).is_dir()]
        found = _by_component([path for place in folders for path in checkpoints_in(place)], {role})
        roles |= _single(folder, {role: found.get(role, [])})
    return roles


def _by_component(paths: Sequence[Path], needed: AbstractSet[str]) -> dict[str, list[Path]]:
    """Group files by what their names prove. A broken file is passed over unless a needed role is then without one."""
    found: dict[str, list[Path]] = {}
    broken: list[CheckpointError] = []
    for path in paths:
        try:
            component = next(iter(components_of(open_weights(path))), None)
        except CheckpointError as error:
            broken.append(error)
            continue
        if component:
            found.setdefault(component, []).append(path)
    if broken and not needed <= found.keys():
        raise broken[0]
    return found


def _single(folder: Path, candidates: dict[str, list[Path]]) -> dict[str, Path]:
    for role, paths in candidates.items():
        if len(paths) > 1:
            raise _ambiguous(folder, role, paths)
    return {role: paths[0] for role, paths in candidates.items() if paths}


def _ambiguous(folder: Path, role: str, paths: Sequence[Path]) -> CatalogError:
    names = ", ".join(str(path.relative_to(folder)) for path in paths)
    flags = "--dit LOW_NOISE --dit-high HIGH_NOISE" if role == "dit" else f"--{role.replace('_', '-')} FILE"
    return CatalogError(
        f"{folder} holds {len(paths)} files that could be its {role.replace('_', ' ')}: {names}",
        f"Name the one to use: {flags}.",
        name=str(folder),
        searched=[str(path) for path in paths],
    )


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}", "Download it again.", path=path) from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{path} is not a table", "Download it again.", path=path)
    return index
