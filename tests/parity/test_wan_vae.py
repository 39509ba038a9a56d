"""WanVAE against the official code's numbers, and the streaming properties that users rely on."""

from __future__ import annotations

import torch

from golden_weights import assert_golden, fill, golden, input_tensor
from kinema.models.wan_vae import WanVAE, WanVAEConfig


def golden_vae(name: str) -> tuple[WanVAE, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    spec, want = golden(name)
    config = spec["config"]
    vae = WanVAE(
        WanVAEConfig(
            version="2.1" if name == "vae21" else "2.2",
            dim=config["dim"],
            dec_dim=config.get("dec_dim"),
            z_dim=config["z_dim"],
            dim_mult=tuple(config["dim_mult"]),
            num_res_blocks=config["num_res_blocks"],
            temporal_downsample=tuple(config["temperal_downsample"]),
        )
    )
    vae.eval().requires_grad_(False)
    fill(vae, spec["salt"])
    scales = {"video": 1.0, "latent": 1.7}
    inputs = {key: input_tensor(key, shape, spec["salt"], scales[key]) for key, shape in spec["inputs"].items()}
    return vae, inputs, want


def test_golden_21() -> None:
    vae, inputs, want = golden_vae("vae21")
    assert_golden(vae.encode(inputs["video"]), want["encode"])
    assert_golden(vae.encode(inputs["video"][:, :, :1]), want["encode_first_frame"])
    assert_golden(vae.decode(inputs["latent"]), want["decode"])


def test_gradients_reach_every_weight_and_the_clip() -> None:
    vae, inputs, _ = golden_vae("vae21")
    vae.requires_grad_(True)
    video = inputs["video"].clone().requires_grad_(True)
    mean, log_variance = vae.moments(video, chunk=99)
    frames = vae.decode(vae.normalise(mean), chunk=99)
    (frames.square().mean() + log_variance.square().mean()).backward()
    assert video.grad is not None and video.grad.abs().min() > 0
    assert [name for name, weight in vae.named_parameters() if weight.grad is None or not weight.grad.any()] == []


def test_golden_22() -> None:
    vae, inputs, want = golden_vae("vae22")
    assert_golden(vae.encode(inputs["video"]), want["encode"])
    assert_golden(vae.encode(inputs["video"][:, :, :1]), want["encode_first_frame"])
    assert_golden(vae.decode(inputs["latent"]), want["decode"])
