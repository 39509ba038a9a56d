"""The cost formulas against the operations torch really does, at published sizes and at tiny ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kinema.models.encoders import UMT5, ClipVision, ClipVisionConfig, TextEncoderConfig
from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_vae import WanVAE, WanVAEConfig
from kinema.planning import cost
from kinema.schema import Machine, calibration_key
from kinema.tensors import Conditions


class Operations(TorchDispatchMode):
    """Sums torch's own FLOP formulas. Its FlopCounterMode would decompose every other operation too, for minutes."""

    FORMULAS: ClassVar = flop_registry | {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_val, **__: (
            4 * q.numel() * k.shape[2]
        )
    }

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        formula = self.FORMULAS.get(operation._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def counted(run, *arguments):
    with torch.no_grad(), Operations() as operations:
        result = run(*arguments)
    return operations.total, result


@pytest.mark.parametrize("clip", [False, True])
def test_dit(clip):
    config = WanConfig(
        dim=256, ffn_dim=640, num_layers=3, in_channels=36, out_channels=16, text_dim=40, text_len=24, freq_dim=64,
        has_clip_tokens=clip, clip_dim=48,
    )  # fmt: skip
    model = WanDiT(config)
    conditions = Conditions(
        (torch.zeros(24, 40),), torch.zeros(1, 257, 48) if clip else None, torch.zeros(1, 20, 3, 6, 8)
    )
    noise, timestep = torch.zeros(1, 16, 3, 6, 8), torch.zeros(1)
    with torch.no_grad():
        context = model.prepare(conditions)
        model(noise, timestep, context)  # makes the keys and values that later ones find
    forward, _ = counted(model, noise, timestep, context)
    clip_tokens = 257 if clip else 0
    assert forward == pytest.approx(cost.dit_flops(asdict(config), 36, 24 + clip_tokens), rel=1e-3)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
@pytest.mark.parametrize("frames", [1, 3])
def test_vae(version, frames):
    z = {"2.1": 16, "2.2": 48}[version]
    config = WanVAEConfig(version=version, dim=8, dec_dim=8 if version == "2.1" else 12, z_dim=z)
    vae = WanVAE(config)
    edge = vae.spatial_stride
    encoded, _ = counted(vae.encode, torch.zeros(1, 3, 4 * frames - 3, 3 * edge, 4 * edge))
    decoded, _ = counted(vae.decode, torch.zeros(1, z, frames, 3, 4))
    assert encoded == pytest.approx(cost.vae_encode_flops(asdict(config), frames, 3, 4), rel=1e-3)
    assert decoded == pytest.approx(cost.vae_decode_flops(asdict(config), frames, 3, 4), rel=1e-3)


def test_encoders():
    text = TextEncoderConfig(vocab=64, dim=32, dim_attn=48, num_heads=4, ffn_dim=80, num_layers=3)
    got, _ = counted(UMT5(text).encode, torch.ones(1, 11, dtype=torch.long))
    assert got == pytest.approx(cost.text_encoder_flops(asdict(text), 11), rel=1e-3)
    vision = ClipVisionConfig(image_size=28, patch_size=7, dim=32, num_heads=2, num_layers=4)
    got, _ = counted(ClipVision(vision), torch.zeros(1, 3, 28, 28))
    assert got == pytest.approx(cost.clip_flops(asdict(vision)), rel=1e-3)


DIT_14B = {"dim": 5120, "ffn_dim": 13824, "num_layers": 40, "in_channels": 16, "out_channels": 16}
DIT_5B = {"dim": 3072, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
VAE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temporal_downsample": [False, True, True]}
VAE_21 = VAE | {"version": "2.1", "dim": 96, "dec_dim": 96, "z_dim": 16}
VAE_22 = VAE | {"version": "2.2", "dim": 160, "dec_dim": 256, "z_dim": 48}


def test_published_sizes():
    """TFLOPs worked out elsewhere for the full models."""
    assert cost.dit_flops(DIT_14B, 21 * 30 * 52, 512) == pytest.approx(1678e12, rel=0.01)
    assert cost.dit_flops(DIT_14B, 21 * 45 * 80, 512) == pytest.approx(6523e12, rel=0.01)
    assert cost.dit_flops(DIT_5B, 31 * 22 * 40, 512) == pytest.approx(517e12, rel=0.01)
    assert cost.vae_decode_flops(VAE_21, 21, 60, 104) == pytest.approx(275e12, rel=0.02)
    assert cost.vae_encode_flops(VAE_21, 21, 60, 104) == pytest.approx(164e12, rel=0.02)
    assert cost.vae_decode_flops(VAE_22, 31, 44, 80) == pytest.approx(2011e12, rel=0.02)
    umt5 = {"dim": 4096, "dim_attn": 4096, "ffn_dim": 10240, "num_layers": 24}
    assert cost.text_encoder_flops(umt5, 512) == pytest.approx(4.84e12, rel=0.02)


def test_seconds_come_from_the_nearest_size_measured():
    calibration = {calibration_key("sample", 2e12): 1e11, calibration_key("sample", 5e9): 2e10}
    assert cost.predict_seconds(4e12, calibration, "sample") == pytest.approx(40)
    assert cost.predict_seconds(4e13, calibration, "sample") == pytest.approx(400)
    assert cost.predict_seconds(4e9, calibration, "sample") == pytest.approx(0.2)
    assert cost.predict_seconds(4e16, calibration, "sample") is None, "three decades away is a guess"
    assert cost.predict_seconds(4e12, calibration, "decode") is None


def test_texts_of_flux_cost_what_padding_makes_of_them():
    from plan.world import plan

    short, long = (cost.work(plan("flux.1-dev", prompt="a cat" * count))["encode text"] for count in (1, 200))
    assert short == long == cost.text_encoder_flops(plan("flux.1-dev").text_encoder.config, 512)


def test_a_plan_is_priced_stage_by_stage():
    from plan.world import plan

    small = plan("wan2.2-t2v-a14b")
    assert [price.stage for price in small.costs] == ["encode text", "load", "sample", "decode"]
    rates = {calibration_key(stage, amount): amount / 3 for stage, amount in cost.work(small).items()}
    machine = Machine(device="cuda", memory_total=141 * 10**9, memory_free=140 * 10**9, calibration=rates)
    assert all(price.seconds == pytest.approx(3) for price in cost.estimate(small, machine))
    roomy = {price.stage: price.peak_bytes for price in cost.estimate(small, machine)}
    tight_machine = machine.model_copy(update={"memory_free": 40 * 10**9})
    narrow = plan("wan2.2-t2v-a14b", facts={"machine": tight_machine})
    tight = {price.stage: price.peak_bytes for price in cost.estimate(narrow, tight_machine)}
    experts = [ref.parameters * 2 for ref in small.experts.values()]
    assert roomy["sample"] > sum(experts) > tight["sample"] > max(experts) / 2
