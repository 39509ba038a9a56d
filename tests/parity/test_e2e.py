"""Whole runs against the official pipelines: noise in, latents and video out, with the verbs the engine uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema import ops
from kinema.conditioning import Canvas
from kinema.media.frames import pack_mask
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.sampling.denoiser import Branch, sample
from kinema.sampling.schedule import expert_of, schedule
from kinema.schema import Expert, PlanStep
from kinema.tensors import Conditions

TOLERANCE = 2e-4
CPU = torch.device("cpu")


def dit(config: dict[str, Any], salt: int) -> WanDiT:
    model = WanDiT(
        WanConfig(
            dim=config["dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            in_channels=config["in_dim"],
            out_channels=config["out_dim"],
            text_dim=config["text_dim"],
            text_len=config["text_len"],
            freq_dim=config["freq_dim"],
        )
    )
    fill(model, salt)
    return model.eval()


def vae(config: dict[str, Any], version: str) -> WanVAE:
    model = WanVAE(
        WanVAEConfig(
            version=version,
            dim=config["dim"],
            dec_dim=config.get("dec_dim"),
            z_dim=config["z_dim"],
            num_res_blocks=config["num_res_blocks"],
        )
    )
    fill(model, 1)
    return model.eval()


def plan_steps(config: dict[str, Any], late: int = 0) -> list[PlanStep]:
    """The steps of the spec; `late` switches the expert that many steps late (a planted fault)."""
    grid = schedule(config["solver"], config["steps"], config["shift"])
    boundary = config.get("boundary")
    experts: list[Expert] = [expert_of(t, boundary) for t in grid.timesteps]
    experts = ["high" if i < experts.count("high") + late else e for i, e in enumerate(experts)] if late else experts
    low_high = config.get("guide_scale_low_high", [config.get("guide_scale")] * 2)
    return [
        PlanStep(sigma=s, timestep=t, expert=e, guidance=low_high[e == "high"])
        for s, t, e in zip(grid.sigmas, grid.timesteps, experts, strict=False)
    ]


def image_channels(vae: WanVAE, images: dict[str, Tensor], frames: int, chunk: int = 1) -> Tensor:
    """Return mask4 + image channels, [1, 4 + z, F, h, w], of the first and last frame of `frames`, others grey."""
    canvas = Canvas(frames, *next(iter(images.values())).shape[1:])
    for role, image_CHW in images.items():
        canvas.put(0 if role == "first" else -1, image_CHW, None)
    latents_BCFhw = vae.encode(canvas.known_CTHW[None], chunk=chunk)
    mask_CFhw = pack_mask(1 - canvas.mask_1THW, *latents_BCFhw.shape[3:]).to(latents_BCFhw)
    return torch.cat([mask_CFhw[None], latents_BCFhw], dim=1)


def run(spec: dict[str, Any], late: int = 0, device: torch.device = CPU) -> tuple[Tensor, WanVAE]:
    """Return (latents_BCFhw, vae) of the run a golden spec describes."""
    config = spec["config"]
    two = "salt_high" in config
    salts = {"high": config["salt_high"], "low": config["salt_low"]} if two else {"model": config["salt_dit"]}
    models = {expert: dit(config["dit"], salt).to(device) for expert, salt in salts.items()}
    autoencoder = vae(config["vae"], "2.2" if config["vae"]["z_dim"] == 48 else "2.1").to(device)
    noise = input_tensor("noise", spec["inputs"]["noise"], 1)[None].to(device)
    concat = clean = None
    if config["dit"]["model_type"] == "i2v":
        image = input_tensor("image", (3, config["height"], config["width"]), 1, scale=1.0).to(device)
        concat = image_channels(autoencoder, {"first": image}, config["frames"])
    elif "image" in spec["inputs"]:
        image = input_tensor("image", spec["inputs"]["image"], 1, scale=1.0).to(device)
        clean = autoencoder.encode(image[None, :, None])
    texts: dict[Branch, str] = {"cond": "context", "uncond": "context_null"}
    conditions = {
        branch: Conditions((input_tensor(name, spec["inputs"][name], 1),), None, concat, clean)
        for branch, name in texts.items()
    }
    velocity = ops.Velocity(lambda expert: models[expert], conditions, device)
    *_, last = sample(plan_steps(config, late), config["solver"], noise, velocity, clean)
    return last.x, autoencoder


NAMES = ("e2e_t2v_a14b", "e2e_t2v_a14b_dpmpp", "e2e_i2v_a14b", "e2e_ti2v_5b_image", "e2e_ti2v_5b_text")


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_run_equals_the_official_pipeline(name: str) -> None:
    spec, want = golden(name)
    latents, autoencoder = run(spec)
    assert_golden(latents[0], want["latent"], TOLERANCE)
    video = torch.cat([chunk.clamp(-1, 1) for chunk in autoencoder.decode_chunks(want["latent"][None])], dim=2)
    assert_golden(video, want["video"].clamp(-1, 1), TOLERANCE)


@pytest.mark.parametrize("name", NAMES[:3])
def test_each_step_runs_the_official_expert(name: str) -> None:
    spec, want = golden(name)
    high = [step.expert == "high" for step in plan_steps(spec["config"])]
    assert high == want["high_noise_steps"].bool().tolist()


@torch.inference_mode()
def test_expert_switched_one_step_late_is_caught() -> None:
    spec, want = golden("e2e_t2v_a14b_dpmpp")
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(run(spec, late=1)[0][0], want["latent"], TOLERANCE)
