"""Which file of a folder plays which role, where certain; and an error with the candidates where not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import TINY_VAE22, official_state, write
from kinema.errors import CatalogError, CheckpointError
from kinema.schema import Component
from kinema.weights.detect import inspect, name_suggests
from kinema.weights.folders import find_tokenizer, resolve_folder

WAN = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"], "vae": ["diffusers", "A"]}
TWO = {**WAN, "transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.875}


def put(path: Path, component: Component) -> Path:
    return write(path, official_state(component))


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def diffusers(folder: Path, index: object, *parts: str) -> Path:
    for part in parts:
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
    return folder


def test_official_folder_of_two_experts(tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        put(tmp_path / name / "diffusion_pytorch_model-00001-of-00001.safetensors", "dit")
    vae = put(tmp_path / "Wan2.1_VAE.safetensors", "vae")
    text = put(tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors", "text_encoder")
    tokenizer = touch(tmp_path / "google/umt5-xxl/spiece.model")
    assert resolve_folder(tmp_path) == {
        "dit": tmp_path / "low_noise_model",
        "dit_high": tmp_path / "high_noise_model",
        "vae": vae,
        "text_encoder": text,
        "tokenizer": tokenizer,
    }
    assert inspect(tmp_path / "high_noise_model").name_suggests == "high"


def test_official_folder_of_one_model_with_clip(tmp_path: Path) -> None:
    half = list(official_state("dit").items())
    for number in range(2):
        name = f"diffusion_pytorch_model-0000{number + 1}-of-00002.safetensors"
        write(tmp_path / name, dict(half[number::2]))
    for name, component in (("c", "clip_vision"), ("t", "text_encoder"), ("v", "vae")):
        put(tmp_path / f"{name}.safetensors", component)  # type: ignore[arg-type]
    touch(tmp_path / "relighting_lora.ckpt")
    found = resolve_folder(tmp_path)
    assert found == {
        "dit": tmp_path / "diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae": tmp_path / "v.safetensors",
        "text_encoder": tmp_path / "t.safetensors",
        "clip_vision": tmp_path / "c.safetensors",
    }
    assert len(inspect(found["dit"]).files) == 2


def test_two_dits_are_listed_not_chosen(tmp_path: Path) -> None:
    put(tmp_path / "wan_high.safetensors", "dit")
    put(tmp_path / "wan_low.safetensors", "dit")
    with pytest.raises(CatalogError, match=r"(?s)2 files that could be its dit: wan_high.*, wan_low.*--dit LOW_NOISE"):
        resolve_folder(tmp_path)


def test_roles_given_by_hand_are_not_looked_for(tmp_path: Path) -> None:
    put(tmp_path / "wan_high.safetensors", "dit")
    put(tmp_path / "wan_low.safetensors", "dit")
    vae = put(tmp_path / "v.safetensors", "vae")
    assert resolve_folder(tmp_path, given=("dit", "dit_high")) == {"vae": vae}


def test_a_dit_beside_expert_folders_is_ambiguous(tmp_path: Path) -> None:
    (tmp_path / "high_noise_model").mkdir()
    put(tmp_path / "a.safetensors", "dit")
    with pytest.raises(CatalogError, match=r"a\.safetensors, high_noise_model"):
        resolve_folder(tmp_path)


def test_a_broken_file_is_not_taken_for_absent(tmp_path: Path) -> None:
    put(tmp_path / "v.safetensors", "vae")
    put(tmp_path / "t.safetensors", "text_encoder")
    path = put(tmp_path / "d.safetensors", "dit")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="100 bytes are missing"):
        resolve_folder(tmp_path)


def test_an_empty_folder_has_no_roles(tmp_path: Path) -> None:
    assert resolve_folder(tmp_path) == {}


def test_diffusers_folders(tmp_path: Path) -> None:
    one = diffusers(tmp_path / "one", WAN, "transformer", "vae", "text_encoder")
    assert resolve_folder(one) == {"dit": one / "transformer", "vae": one / "vae"}
    index = {**TWO, "text_encoder": ["transformers", "UMT5EncoderModel"], "image_encoder": [None, None]}
    two = diffusers(tmp_path / "two", index, "transformer", "transformer_2", "vae", "text_encoder", "image_encoder")
    tokenizer = touch(two / "tokenizer/tokenizer.json")
    assert resolve_folder(two) == {
        "dit": two / "transformer_2",
        "dit_high": two / "transformer",
        "vae": two / "vae",
        "text_encoder": two / "text_encoder",
        "tokenizer": tokenizer,
    }


def test_experts_of_an_unknown_pipeline_are_asked_for(tmp_path: Path) -> None:
    folder = diffusers(tmp_path, {**TWO, "_class_name": "WanFunPipeline"}, "transformer", "transformer_2")
    with pytest.raises(CatalogError, match="transformer, transformer_2"):
        resolve_folder(folder)


def test_a_missing_expert_leaves_its_role_out(tmp_path: Path) -> None:
    folder = diffusers(tmp_path, TWO, "transformer", "vae")
    assert "dit" not in resolve_folder(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_model_index(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"model_index\.json is not"):
        resolve_folder(diffusers(tmp_path, text))


def test_comfyui_root(tmp_path: Path) -> None:
    dit = put(tmp_path / "diffusion_models/wan.safetensors", "dit")
    vae = put(tmp_path / "vae/wan_2.1_vae.safetensors", "vae")
    text = put(tmp_path / "clip/umt5.safetensors", "text_encoder")
    clip = put(tmp_path / "clip_vision/h.safetensors", "clip_vision")
    touch(tmp_path / "vae/flux.safetensors")
    assert resolve_folder(tmp_path) == {"dit": dit, "vae": vae, "text_encoder": text, "clip_vision": clip}
    write(tmp_path / "vae/wan2.2_vae.safetensors", official_state("vae", TINY_VAE22))
    with pytest.raises(CatalogError, match=r"(?s)2 files that could be its vae: vae/wan2\.2_vae.*--vae FILE"):
        resolve_folder(tmp_path)


@pytest.mark.parametrize("place", ["google/umt5-xxl/spiece.model", "tokenizer/tokenizer.json", "spiece.model"])
def test_tokenizers_are_found_beside_the_text_encoder(tmp_path: Path, place: str) -> None:
    encoder = tmp_path / "umt5.pth"
    assert find_tokenizer(encoder, ()) is None
    wanted = touch(tmp_path / place)
    assert find_tokenizer(encoder, ()) == wanted
    assert find_tokenizer(wanted, ()) == find_tokenizer(wanted.parent, ()) == wanted
    assert find_tokenizer(tmp_path / "elsewhere/umt5.pth", (tmp_path,)) == (wanted if "/" in place else None)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("wan2.2_t2v_high_noise_14B_fp16.safetensors", "high"),
        ("wan2.2_t2v_low_noise_14B_fp16.safetensors", "low"),
        ("Wan2_2-T2V-A14B_HIGH_fp16.safetensors", "high"),
        ("Wan2_2-T2V-A14B-LOW.safetensors", "low"),
        ("Wan2.2-T2V-A14B-HighNoise-F16.safetensors", "high"),
        ("low_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "low"),
        ("high_noise_model", "high"),
        ("wan_highres.safetensors", None),
        ("slow_motion.safetensors", None),
        ("high_and_low.safetensors", None),
        ("wan2.1_t2v_1.3B.safetensors", None),
        ("transformer/diffusion_pytorch_model.safetensors", None),
        ("transformer_2/diffusion_pytorch_model.safetensors", "low"),
    ],
)
def test_names_suggest_an_expert(tmp_path: Path, name: str, wanted: str | None) -> None:
    assert name_suggests(tmp_path / "models" / name) == wanted


def test_diffusers_transformer_is_the_high_one_only_beside_a_second(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer_2").mkdir()
    assert name_suggests(tmp_path / "transformer") == "high"
