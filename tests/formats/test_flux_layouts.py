"""Every FLUX.1 layout, in every spelling, is recognised from its header and fits our modules exactly; all-in-one
files part by part; values as well as names against diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import manifest, write, write_sparse
from golden_weights import assert_golden, fill, input_tensor
from kinema.errors import CheckpointError
from kinema.models.flux import FluxDiT, pack
from kinema.models.flux_vae import FluxVAE
from kinema.schema import FileFacts, ModelRef
from kinema.tensors import Conditions, FluxConditions
from kinema.weights.detect import inspect
from kinema.weights.files import open_tensors
from kinema.weights.keys import components_of, translate
from kinema.weights.keys_flux import PARTS
from kinema.weights.load import load

DEV = {
    "dim": 3072, "mlp_dim": 12288, "num_double": 19, "num_single": 38, "in_channels": 16, "out_channels": 16,
    "text_dim": 4096, "vector_dim": 768, "has_guidance": True,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "dev": (DEV, 11_901_408_320),
    "schnell": ({**DEV, "has_guidance": False}, 11_891_178_560),
    "fill": ({**DEV, "in_channels": 96}, 11_902_391_360),
    "canny": ({**DEV, "in_channels": 32}, 11_901_604_928),
}


def layout(name: str) -> dict[str, tuple[int, ...]]:
    shapes = manifest("flux1_schnell" if name == "schnell" else "flux1_dev")
    return shapes | {"img_in.weight": (3072, 4 * VARIANTS[name][0]["in_channels"])}


def diffusers_dit(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * config["in_channels"],
        out_channels=4 * config["out_channels"],
        num_layers=config["num_double"],
        num_single_layers=config["num_single"],
        num_attention_heads=config["dim"] // 128,
        joint_attention_dim=config["text_dim"],
        pooled_projection_dim=config["vector_dim"],
        guidance_embeds=config["has_guidance"],
    )


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("spelling", ["official", "comfyui", "diffusers"])
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers(tmp_path: Path, name: str, spelling: str) -> None:
    config, parameters = VARIANTS[name]
    official = layout(name)
    shapes = {("model.diffusion_model." if spelling == "comfyui" else "") + key: s for key, s in official.items()}
    if spelling == "diffusers":
        with torch.device("meta"):
            shapes = shapes_of(diffusers_dit(config))
    path = write_sparse(tmp_path / "a.safetensors", shapes)
    facts = inspect(path)
    translation = translate(open_tensors(path))
    assert {key: translation.shape(key) for key in translation.sources} == official
    assert (facts.component, facts.dialect, facts.config) == ("flux_dit", spelling, config)
    assert (facts.parameters, facts.tensors) == (parameters, len(official))


@pytest.mark.parametrize("spelling", ["official", "diffusers"])
def test_autoencoders(tmp_path: Path, spelling: str) -> None:
    from diffusers import AutoencoderKL

    shapes = official = manifest("flux1_ae")
    if spelling == "diffusers":
        with torch.device("meta"):
            shapes = shapes_of(AutoencoderKL(**_diffusers_vae(128, 2)))
    path = write_sparse(tmp_path / "a.safetensors", shapes, "F32")
    facts = inspect(path)
    translation = translate(open_tensors(path))
    assert {key: translation.shape(key) for key in translation.sources} == official
    assert (facts.component, facts.dialect, facts.parameters) == ("flux_vae", spelling, 83_819_683)
    assert facts.config == {"dim": 128, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_dim": 16}


def _diffusers_vae(dim: int, blocks: int) -> dict[str, Any]:
    return {
        "block_out_channels": [dim, 2 * dim, 4 * dim, 4 * dim],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": blocks,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def test_encoders(tmp_path: Path) -> None:
    facts = inspect(write_sparse(tmp_path / "t5.safetensors", manifest("t5xxl_encoder_transformers"), "F16"))
    assert (facts.component, facts.config["shared_bias"], facts.config["num_layers"]) == ("t5", True, 24)
    facts = inspect(write_sparse(tmp_path / "l.safetensors", manifest("clip_l_transformers"), "F16"))
    assert (facts.component, facts.config["dim"], facts.config["num_positions"]) == ("clip_text", 768, 77)
    redux = {
        "redux_up.weight": (12288, 1152), "redux_up.bias": (12288,),
        "redux_down.weight": (4096, 12288), "redux_down.bias": (4096,),
    }  # fmt: skip
    facts = inspect(write_sparse(tmp_path / "r.safetensors", redux))
    assert (facts.component, facts.config["text_dim"]) == ("redux", 4096)


def all_in_one() -> dict[str, tuple[int, ...]]:
    return {
        **{PARTS["flux_dit"] + key: shape for key, shape in manifest("flux1_dev").items()},
        **{PARTS["flux_vae"] + key: shape for key, shape in manifest("flux1_ae").items()},
        **{PARTS["t5"] + key: shape for key, shape in manifest("t5xxl_encoder_transformers").items()},
        **{PARTS["clip_text"] + key: shape for key, shape in manifest("clip_l_transformers").items()},
        "text_encoders.t5xxl.logit_scale": (),
        "text_encoders.clip_l.transformer.text_projection.weight": (768, 768),
    }


def test_an_all_in_one_file_is_all_of_its_parts(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "flux1-dev-fp8.safetensors", all_in_one())
    assert set(components_of(open_tensors(path))) == set(PARTS)
    found: dict[str, FileFacts] = {part: inspect(path, part) for part in PARTS}  # type: ignore[arg-type]
    assert [facts.component for facts in found.values()] == list(PARTS)
    assert found["flux_dit"].parameters == 11_901_408_320
    assert found["flux_vae"].parameters == 83_819_683
    assert inspect(path).component == "flux_dit"


def test_what_belongs_to_no_part_is_left_over(tmp_path: Path) -> None:
    path = write_sparse(tmp_path / "a.safetensors", all_in_one() | {"control.weight": (3,)})
    for part in PARTS:
        with pytest.raises(CheckpointError, match=r"1 tensors \(control\.weight\) left over"):
            inspect(path, part)  # type: ignore[arg-type]


# --- values, against diffusers ---------------------------------------------------------------------

TINY = {**DEV, "dim": 256, "mlp_dim": 1024, "num_double": 1, "num_single": 2, "text_dim": 40, "vector_dim": 24}


def loaded(path: Path) -> torch.nn.Module:
    facts = inspect(path)
    return load(
        ModelRef(
            component=facts.component, files=facts.files, dialect=facts.dialect, container=facts.container,
            config=facts.config, dtype="float32",
        )
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("has_guidance", [True, False])
def test_a_diffusers_file_gives_diffusers_velocity(tmp_path: Path, has_guidance: bool) -> None:
    theirs = diffusers_dit({**TINY, "has_guidance": has_guidance}).eval()
    fill(theirs, 3)
    model = loaded(write(tmp_path / "a.safetensors", theirs.state_dict()))
    assert isinstance(model, FluxDiT)
    x, text = input_tensor("x", (1, 16, 1, 8, 12), 3), input_tensor("text", (1, 9, 40), 3)
    pooled, extra = input_tensor("pooled", (1, 24), 3), input_tensor("image", (1, 16, 1, 4, 6), 3)
    guidance = 3.5 if has_guidance else None
    context = model.prepare(Conditions((text[0],), flux=FluxConditions(pooled, guidance, (extra,))))
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    ids = torch.stack([torch.zeros(24), rows.flatten(), columns.flatten()], dim=1)
    small = ids[(ids[:, 1] < 2) & (ids[:, 2] < 3)] + torch.tensor([1.0, 0, 0])
    want = theirs(
        hidden_states=torch.cat([pack(x), pack(extra)], dim=1),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([0.73]),
        img_ids=torch.cat([ids, small]),
        txt_ids=torch.zeros(9, 3),
        guidance=torch.tensor([3.5]) if has_guidance else None,
        return_dict=False,
    )[0][:, :24]
    assert_golden(pack(model(x, torch.tensor([730.0]), context)), want)


@torch.no_grad()
def test_a_diffusers_autoencoder_gives_diffusers_values(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(**_diffusers_vae(32, 1)).eval()
    fill(theirs, 3)
    vae = loaded(write(tmp_path / "a.safetensors", theirs.state_dict()))
    assert isinstance(vae, FluxVAE)
    image, latents = input_tensor("image", (1, 3, 32, 48), 3, 1.0), input_tensor("latents", (1, 16, 4, 6), 3)
    want = 0.3611 * (theirs.encode(image).latent_dist.mean - 0.1159)
    assert_golden(vae.encode(image[:, :, None])[:, :, 0], want, 1e-5)
    (frame,) = vae.decode_chunks(latents[:, :, None])
    assert_golden(frame[:, :, 0], theirs.decode(latents / 0.3611 + 0.1159).sample, 1e-5)


@torch.no_grad()
def test_tiles_cover_the_image(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(**_diffusers_vae(32, 1)).eval()
    fill(theirs, 3)
    vae = loaded(write(tmp_path / "a.safetensors", theirs.state_dict()))
    assert isinstance(vae, FluxVAE)
    latents = input_tensor("latents", (1, 16, 1, 12, 20), 3)
    (whole,), (tiled,) = vae.decode_chunks(latents), vae.decode_chunks(latents, tile=64)
    assert tiled.shape == whole.shape == (1, 3, 1, 96, 160)
    # Group norms and attention see the tile alone, so tiles only resemble the whole; but nothing is left out.
    assert (tiled - whole).abs().mean() < 0.5 * whole.abs().mean()
    assert tiled.abs().amin(dim=(0, 1, 2)).min() > 0
    (one_tile,) = vae.decode_chunks(latents, tile=160)
    assert torch.equal(one_tile, whole)
