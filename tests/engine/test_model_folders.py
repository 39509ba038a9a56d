"""`--model FOLDER` in every layout gives the latents of the same files named one by one: real files, whole runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from formats.test_load import State, clip_to_transformers, dit_to_diffusers, prefixed, text_to_transformers
from kinema.engine import Engine
from kinema.schema import Request, Result
from kinema.weights.convert import convert
from tiny_world import TinyWorld, picture, spiece_model

DITS = {"tiny-t2v-two": ("t2v", "t2v_high"), "tiny-flf": ("flf",)}
"""Model -> its files, the low-noise expert first."""


def shards(folder: Path, state: State, name: str = "diffusion_pytorch_model") -> None:
    """Write a state as two files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{name}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, file in enumerate(files):
        save_file(dict(list(state.items())[number::2]), folder / file)
    index = {"weight_map": {key: files[number % 2] for number, key in enumerate(state)}}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def parts(world: TinyWorld, dits: tuple[str, ...]) -> tuple[list[State], State, State, State]:
    """The states of the DiTs, text encoder, VAE and CLIP in official names; the tokenizer is not inside."""
    text = load_file(world.file("text_encoders/tiny_umt5.safetensors"))
    del text["spiece_model"]
    states = [load_file(world.file(f"diffusion_models/{name}.safetensors")) for name in dits]
    vae, clip = (
        load_file(world.file(name)) for name in ("vae/tiny_vae.safetensors", "clip_vision/tiny_clip.safetensors")
    )
    return states, text, vae, clip


def official(world: TinyWorld, dits: tuple[str, ...], folder: Path) -> None:
    states, text, vae, clip = parts(world, dits)
    places = [folder / name for name in ("low_noise_model", "high_noise_model")] if len(dits) == 2 else [folder]
    for place, state in zip(places, states, strict=True):
        shards(place, state)
    torch.save(text, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(vae, folder / "Wan2.1_VAE.pth")
    torch.save(clip, folder / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth")
    (folder / "google/umt5-xxl").mkdir(parents=True)
    (folder / "google/umt5-xxl/spiece.model").write_bytes(spiece_model())


def diffusers(world: TinyWorld, dits: tuple[str, ...], folder: Path) -> None:
    """transformer is the high-noise expert, transformer_2 the low-noise one."""
    states, text, _, clip = parts(world, dits)
    names = ("transformer_2", "transformer") if len(dits) == 2 else ("transformer",)
    for name, state in zip(names, states, strict=True):
        shards(folder / name, dit_to_diffusers(state))
    shards(folder / "text_encoder", text_to_transformers(text), "model")
    shards(folder / "image_encoder", clip_to_transformers(clip), "model")
    (folder / "vae").mkdir()
    vae = folder / "vae/diffusion_pytorch_model.safetensors"
    list(convert(world.file("vae/tiny_vae.safetensors"), vae, None, "diffusers"))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/spiece.model").write_bytes(spiece_model())
    index = {name: ["diffusers", "X"] for name in (*names, "vae", "text_encoder", "image_encoder", "tokenizer")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))


def comfyui(world: TinyWorld, dits: tuple[str, ...], folder: Path) -> None:
    """One DiT a folder: of two, ComfyUI's layout does not say which is which."""
    states, text, vae, clip = parts(world, dits)
    text["spiece_model"] = torch.frombuffer(bytearray(spiece_model()), dtype=torch.uint8)
    named = {"diffusion_models": prefixed(states[0]), "text_encoders": text, "vae": vae, "clip_vision": clip}
    for name, state in named.items():
        (folder / name).mkdir(parents=True)
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / name / "tiny.safetensors")


def latents(engine: Engine, folder: Path, **fields: object) -> Tensor:
    save = folder / "out.latents.safetensors"
    request = Request(
        prompt="a cat walks", seed=3, precision="reference", device="cpu", save=save, overwrite=True, **fields
    )
    (result,) = (event for event in engine.run(engine.plan(request)) if isinstance(event, Result))
    return load_file(result.paths[0])["latents"]


LAYOUTS = [(official, "tiny-t2v-two"), (diffusers, "tiny-t2v-two"), (official, "tiny-flf"), (diffusers, "tiny-flf")]


@pytest.mark.parametrize(("write", "model"), [*LAYOUTS, (comfyui, "tiny-flf")])
def test_a_folder_is_its_files(
    engine: Engine, tiny_world: TinyWorld, tmp_path: Path, write: Callable[..., None], model: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write(tiny_world, DITS[model], folder)
    media = {role: picture(tmp_path / f"{role}.png") for role in ("first", "last")} if model == "tiny-flf" else {}
    wanted = latents(engine, tmp_path, model=model, **media)
    assert torch.equal(latents(engine, tmp_path, model=str(folder), **media), wanted)
    if write is diffusers and len(DITS[model]) == 2:  # exchanged, as a reader that guesses wrong would have them
        (folder / "transformer").rename(folder / "t")
        (folder / "transformer_2").rename(folder / "transformer")
        (folder / "t").rename(folder / "transformer_2")
        swapped = latents(engine, tmp_path, model=str(folder), **media)
        assert not torch.equal(swapped, wanted), "what was loaded of files that have changed must not be used again"
