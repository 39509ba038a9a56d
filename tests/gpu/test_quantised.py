"""Packed weights on a GPU: the same numbers as on the CPU, and fp8 times fp8 by its own matrix units."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kinema.models.layers import Linear
from kinema.runtime.machine import probe_machine
from kinema.weights.quantised.blocks import BLOCK_TYPES
from kinema.weights.quantised.layers import Activations, QuantisedLinear
from kinema.weights.quantised.packed import Packed, quantise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NUMBERS = [
    ("fp8_e4m3", "none"),
    ("fp8_e5m2", "tensor"),
    ("fp8_e4m3", "channel"),
    ("fp8_e4m3", "64"),
    ("int8", "channel"),
]


def random_blocks(kind: str) -> Packed:
    """Bytes below 100 make finite float16 scales wherever they stand."""
    block = BLOCK_TYPES[kind]
    data = torch.randint(0, 100, (64, 4 * block.bytes), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Packed(kind, (64, 4 * block.weights), data)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_unpack_to_the_same_bits(kind: str) -> None:
    packed = random_blocks(kind)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.to("cuda").dequantised(dtype).cpu(), packed.dequantised(dtype))


@pytest.mark.parametrize(("kind", "scales"), NUMBERS)
def test_numbers_unpack_and_round_to_the_same_bits(kind: str, scales: str) -> None:
    weight = torch.randn(256, 512)
    packed = quantise(weight, kind, scales)
    assert torch.equal(packed.to("cuda").dequantised().cpu(), packed.dequantised())
    there = quantise(weight.cuda(), kind, scales).dequantised().cpu()
    assert (there - packed.dequantised()).norm() <= 1e-3 * weight.norm()


def test_fp8_is_multiplied_as_on_the_cpu() -> None:
    if not probe_machine("cuda").fp8_matmul:
        pytest.skip("this card does not multiply fp8")
    packed = quantise(torch.randn(1024, 512) * 0.02, "fp8_e4m3", "channel")
    x = torch.randn(3, 333, 512)
    bias = torch.randn(1024, dtype=torch.bfloat16)
    wanted, found = (
        QuantisedLinear(
            packed.to(device), nn.Parameter(bias.to(device), False), torch.bfloat16, activations=Activations()
        )(x.to(device)).cpu()
        for device in ("cpu", "cuda")
    )
    assert (found.float() - wanted.float()).norm() <= 2**-8 * wanted.float().norm()


def test_a_quantised_layer_moves_with_its_module() -> None:
    layer = QuantisedLinear(quantise(torch.randn(64, 128), "int8", "channel"), Linear(128, 64).bias, torch.bfloat16)
    on_cpu = layer.bfloat16()(torch.ones(1, 128))
    on_gpu = layer.cuda()(torch.ones(1, 128, device="cuda"))
    assert torch.allclose(on_gpu.cpu().float(), on_cpu.float(), rtol=2**-7, atol=2**-7)
