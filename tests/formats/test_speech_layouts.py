"""The layouts of the speech-driven model and of its audio encoder, at full size and in every spelling."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoints import TINY, manifest, official_state, write, write_sparse
from kinema.errors import CheckpointError
from kinema.schema import ModelRef
from kinema.weights.detect import inspect
from kinema.weights.folders import resolve_folder
from kinema.weights.load import load

S2V = "wan2.2_s2v_14B"
WAV2VEC2 = "wav2vec2_large_transformers"
LARGE = {
    "dim": 1024,
    "num_layers": 24,
    "ffn_dim": 4096,
    "conv_dim": 512,
    "kernels": [10, 3, 3, 3, 3, 2, 2],
    "position_kernel": 128,
    "position_width": 64,
}
POSITIONS = "wav2vec2.encoder.pos_conv_embed.conv."


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_s2v(tmp_path: Path, prefix: str) -> None:
    shapes = {prefix + name: shape for name, shape in manifest(S2V).items()}
    facts = inspect(write_sparse(tmp_path / "a.safetensors", shapes))
    assert (facts.component, facts.dialect) == ("dit", "comfyui" if prefix else "official")
    assert facts.config["speech"] == {
        "layers": [0, 4, 8, 12, 16, 20, 24, 27, 30, 33, 36, 39],
        "audio_dim": 1024,
        "audio_layers": 25,
        "num_tokens": 4,
        "pose_channels": 16,
    }
    assert facts.parameters == 16_295_755_609 and facts.tensors == 1260
    assert facts.structure.endswith("no CLIP tokens, sound after some blocks")


def test_s2v_with_a_part_lost_is_refused(tmp_path: Path) -> None:
    shapes = manifest(S2V)
    del shapes["frame_packer.proj_2x.weight"]
    with pytest.raises(CheckpointError, match=r"frame_packer\.proj_2x\.weight"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def fewer_injectors() -> dict[str, tuple[int, ...]]:
    return {
        name: shape
        for name, shape in manifest(S2V).items()
        if not name.startswith(("audio_injector.injector.11.", "audio_injector.injector_adain_layers.11."))
    }


def test_where_injectors_stand_is_never_guessed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="11 audio injectors stand is unknown"):
        inspect(write_sparse(tmp_path / "a.safetensors", fewer_injectors()))


@pytest.mark.parametrize(
    "told", ["[0]", "no", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 99]", pytest.param("[" * 100_000, id="deep")]
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, told: str) -> None:
    with pytest.raises(CheckpointError, match="audio_inject_layers"):
        inspect(write_sparse(tmp_path / "a.safetensors", fewer_injectors(), metadata={"audio_inject_layers": told}))


def test_metadata_may_say_where_injectors_stand(tmp_path: Path) -> None:
    layers = list(range(0, 33, 3))
    told = {"audio_inject_layers": json.dumps(layers)}
    facts = inspect(write_sparse(tmp_path / "a.safetensors", fewer_injectors(), metadata=told))
    assert facts.config["speech"]["layers"] == layers


# --- wav2vec2 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["wav2vec2.", ""])
@pytest.mark.parametrize("positions", ["weight_{}", "parametrizations.weight.original{}"])
def test_wav2vec(tmp_path: Path, prefix: str, positions: str) -> None:
    shapes = manifest(WAV2VEC2)
    for old, number in (("weight_g", 0), ("weight_v", 1)):
        shape = shapes.pop(POSITIONS + old)
        shapes[POSITIONS + positions.format(number if "original" in positions else old[-1])] = shape
    shapes = {prefix + name.removeprefix("wav2vec2."): shape for name, shape in shapes.items()}
    shapes = {name.removeprefix(prefix) if "lm_head" in name else name: shape for name, shape in shapes.items()}
    facts = inspect(write_sparse(tmp_path / "a.safetensors", shapes, "F32"))
    assert (facts.component, facts.dialect, facts.config) == ("audio_encoder", "transformers", LARGE)
    assert {"lm_head.weight", "lm_head.bias"} <= {name.split(" ")[0] for name in facts.ignored} or len(
        facts.ignored
    ) == 2


def test_another_form_of_wav2vec_is_refused(tmp_path: Path) -> None:
    shapes = {
        name: shape
        for name, shape in manifest(WAV2VEC2).items()
        if not (".layer_norm." in name and "conv_layers" in name and "conv_layers.0" not in name)
    }
    with pytest.raises(CheckpointError, match="wav2vec2-large-xlsr-53-english"):
        inspect(write_sparse(tmp_path / "a.safetensors", shapes))


def test_both_spellings_load_to_equal_tensors(tmp_path: Path) -> None:
    state = official_state("audio_encoder")
    newer = {f"wav2vec2.{name}": tensor for name, tensor in state.items()}
    for old, number in (("weight_g", 0), ("weight_v", 1)):
        newer[f"{POSITIONS}parametrizations.weight.original{number}"] = newer.pop(POSITIONS + old)
    newer |= {"wav2vec2.masked_spec_embed": torch.zeros(128), "lm_head.weight": torch.zeros(5, 128)}
    loaded = []
    for number, tensors in enumerate((state, newer)):
        facts = inspect(write(tmp_path / f"{number}.safetensors", tensors))
        assert facts.config == TINY["audio_encoder"]
        ref = ModelRef(
            component="audio_encoder", files=facts.files, dialect=facts.dialect, container=facts.container,
            config=facts.config, dtype="float32",
        )  # fmt: skip
        loaded.append(load(ref).state_dict())
    assert all(torch.equal(loaded[0][name], loaded[1][name]) for name in loaded[0])


# --- folders ---------------------------------------------------------------------------------------


def test_the_official_folder(tmp_path: Path) -> None:
    write_sparse(tmp_path / "diffusion_pytorch_model.safetensors", manifest(S2V))
    write_sparse(tmp_path / "wav2vec2-large-xlsr-53-english/model.safetensors", manifest(WAV2VEC2))
    roles = resolve_folder(tmp_path)
    assert roles["dit"].name == "diffusion_pytorch_model.safetensors"
    assert inspect(roles["audio_encoder"]).component == "audio_encoder"


def test_a_comfyui_folder(tmp_path: Path) -> None:
    write_sparse(tmp_path / "diffusion_models/wan2.2_s2v_14B_bf16.safetensors", manifest(S2V))
    file = write_sparse(tmp_path / "audio_encoders/wav2vec2_large_english_fp16.safetensors", manifest(WAV2VEC2), "F16")
    assert resolve_folder(tmp_path)["audio_encoder"] == file
