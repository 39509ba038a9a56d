"""The FLUX transformer and autoencoder against tensors of the official code, and against diffusers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models.flux import FluxConfig, FluxDiT, pack, unpack
from kinema.models.flux_vae import FluxVAE, FluxVAEConfig
from kinema.sampling.schedule import flux_shift, schedule
from kinema.tensors import Conditions, FluxConditions

VARIANTS = ["flux_dev", "flux_schnell"]


def load(name: str) -> tuple[FluxDiT, Tensor, Tensor, Conditions, Tensor]:
    """Return (model, x, timesteps, conditions, golden velocity) of one golden file. Conditions are those of entry 0:
    the two entries have guidance scales of their own, and Kinema's batches share one."""
    spec, tensors = golden(name)
    given, inputs, salt = spec["config"], spec["inputs"], spec["salt"]
    model = FluxDiT(
        FluxConfig(
            dim=given["hidden_size"],
            mlp_dim=int(given["hidden_size"] * given["mlp_ratio"]),
            num_double=given["depth"],
            num_single=given["depth_single_blocks"],
            text_dim=given["context_in_dim"],
            vector_dim=given["vec_in_dim"],
            has_guidance=given["guidance_embed"],
        )
    ).eval()
    fill(model, salt)
    tokens = input_tensor("img", inputs["img"], salt)
    text, pooled = input_tensor("txt", inputs["txt"], salt), input_tensor("y", inputs["y"], salt)
    x = unpack(tokens, tuple(inputs["grid"]))
    timesteps = 1000 * torch.tensor(inputs["timesteps"])
    guidance = inputs["guidance"] or [None, None]
    entries = [Conditions((text[i],), flux=FluxConditions(pooled[i : i + 1], guidance[i])) for i in range(2)]
    return model, x, timesteps, entries, tensors["out"]


def velocity(model: FluxDiT, x: Tensor, timesteps: Tensor, entries: list[Conditions]) -> Tensor:
    with torch.no_grad():
        rows = [model(x[i : i + 1], timesteps[i : i + 1], model.prepare(one)) for i, one in enumerate(entries)]
    return pack(torch.cat(rows))


@pytest.mark.parametrize("name", VARIANTS)
def test_velocity_equals_the_official_code(name: str) -> None:
    model, x, timesteps, entries, want = load(name)
    assert_golden(velocity(model, x, timesteps, entries), want)


def load_vae() -> tuple[FluxVAE, dict[str, Tensor], dict[str, Tensor]]:
    spec, tensors = golden("flux_ae")
    given, inputs, salt = spec["config"], spec["inputs"], spec["salt"]
    vae = FluxVAE(FluxVAEConfig(given["ch"], tuple(given["ch_mult"]), given["num_res_blocks"], given["z_channels"]))
    fill(vae, salt)
    scales = {"image": 1.0, "latent": 1.7}
    return vae, {key: input_tensor(key, inputs[key], salt, scales[key]) for key in scales}, tensors


@torch.no_grad()
def test_autoencoder_equals_the_official_code() -> None:
    vae, given, want = load_vae()
    assert_golden(vae.encode(given["image"][:, :, None])[:, :, 0], want["encode"])
    (frame,) = vae.decode_chunks(given["latent"][:, :, None])
    assert_golden(frame[:, :, 0], want["decode"])


def test_schedule_equals_the_official_code() -> None:
    _, tensors = golden("flux_schedule")
    for name, want in tensors.items():
        steps, tokens = map(int, name.removeprefix("s").split("_"))
        sigmas = schedule("euler", steps, flux_shift(tokens)).sigmas
        assert torch.allclose(torch.tensor(sigmas), want, atol=1e-6), name
