"""Every GGUF block type gives the numbers of the gguf package to the last bit; where it writes them, its bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from kinema.weights.quantised.blocks import BLOCK_TYPES

HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
"""Bytes at which a block keeps its float16 scales: any other bytes are valid whatever they are."""


def random_blocks(kind: str, count: int, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    """Return valid blocks, uint8 [count, bytes]: random numbers under random finite scales."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (count, BLOCK_TYPES[kind].bytes), np.uint8)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = (generator.standard_normal(count) * scale).astype(np.float16)[:, None].view(np.uint8)
    return blocks


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_numbers_are_those_of_the_gguf_package(kind: str) -> None:
    blocks, block = random_blocks(kind, 512), BLOCK_TYPES[kind]
    wanted = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    found = block.dequantise(torch.from_numpy(blocks))
    assert found.shape == (512, block.weights)
    assert np.array_equal(found.numpy().view(np.uint32), wanted.view(np.uint32)), "not equal to the last bit"


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_every_byte_of_a_block_counts(kind: str) -> None:
    blocks, block = random_blocks(kind, 4), BLOCK_TYPES[kind]
    before = block.dequantise(torch.from_numpy(blocks))
    for at in range(block.bytes):
        changed = blocks.copy()
        changed[:, at] ^= 0x55
        assert not torch.equal(block.dequantise(torch.from_numpy(changed)), before), f"byte {at} has no effect"


@pytest.mark.parametrize("kind", [kind for kind, block in BLOCK_TYPES.items() if block.quantise])
def test_bytes_are_those_of_the_gguf_package(kind: str) -> None:
    generator = np.random.default_rng(1)
    values = (generator.standard_normal((600, 32)) * generator.uniform(1e-4, 10, (600, 1))).astype(np.float32)
    values[0] = 0
    values[1] = 0.25
    values[2, ::2] = -values[2, 1::2]
    wanted = gguf.quantize(values, gguf.GGMLQuantizationType[kind])
    found = BLOCK_TYPES[kind].quantise(torch.from_numpy(values))  # type: ignore[misc]
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_numbers_and_sizes_are_those_of_the_gguf_package(kind: str) -> None:
    block, named = BLOCK_TYPES[kind], gguf.GGMLQuantizationType[kind]
    assert (block.number, (block.weights, block.bytes)) == (named.value, gguf.GGML_QUANT_SIZES[named])
