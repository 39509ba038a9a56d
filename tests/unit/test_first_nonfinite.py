"""The layer that spoilt a step is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kinema.models.wan import WanConfig, WanDiT
from kinema.models.wan_blocks import KVCache
from kinema.runtime.finite import first_nonfinite
from kinema.tensors import Conditions


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = WanDiT(WanConfig(128, 128, 3, 16, 16, text_dim=8, text_len=16, freq_dim=32)).eval()
    with torch.no_grad():
        context = model.prepare(Conditions((torch.randn(3, 8),)))
    return model, torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), context


def test_a_sound_model_has_none(case):
    assert first_nonfinite(*case) is None


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("patch_embedding.bias", "patch_embedding"),
        ("time_embedding.2.weight", "time_embedding.2"),
        ("blocks.1.ffn.2.weight", "blocks.1.ffn.2"),
        ("blocks.2.norm3.weight", "blocks.2.norm3"),
        ("blocks.2.self_attn.norm_k.weight", "blocks.2.self_attn.norm_k"),
        ("blocks.1.modulation", "input of blocks.1.self_attn"),
        ("head.head.bias", "head.head"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_spoilt_layer_is_named(case, parameter: str, layer: str, value: float):
    model, *inputs = case
    model.get_parameter(parameter).data.flatten()[0] = value
    assert first_nonfinite(model, *inputs) == layer


def test_attention_that_overflows_is_told_from_the_layer_after_it(case):
    model, *inputs = case
    model.attention = lambda q, k, v: v * float("inf")
    assert first_nonfinite(model, *inputs) == "input of blocks.0.self_attn.o"


def test_spoilt_inputs_are_named_and_no_hook_stays(case):
    model, x, timesteps, context = case
    assert first_nonfinite(model, x * float("nan"), timesteps, context) == "latents"
    model(x, timesteps, context)
    rows = context.text.rows
    spoilt = KVCache(rows, {block: (k * float("inf"), v) for block, (k, v) in context.text.made.items()})
    for text in (KVCache(rows * float("inf")), spoilt):
        assert first_nonfinite(model, x, timesteps, replace(context, text=text)) == "context"
    model.attention = lambda q, k, v: 1 / 0
    with pytest.raises(ZeroDivisionError):
        first_nonfinite(model, x, timesteps, context)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
