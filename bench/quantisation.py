"""What each format changes, and how fast it is unpacked: the tables of docs/quantised-files.md.

    python bench/quantisation.py            # the errors
    python bench/quantisation.py --speed    # and the speed of unpacking on this CPU

Weights are those of the small model that ships with Kinema, which was trained. We do not write the K and IQ types: they
are rounded here in the simplest way that fits their blocks; public files are made by a search for better scales.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from kinema.models.wan import WanDiT
from kinema.schema import ModelRef
from kinema.tensors import Conditions
from kinema.weights.detect import inspect
from kinema.weights.load import load
from kinema.weights.quantised.blocks import BLOCK_TYPES, IQ4_LEVELS
from kinema.weights.quantised.layers import packable, swap
from kinema.weights.quantised.packed import Packed, quantise

Rounding = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """Errors are root mean squares of the change over that of the value itself."""

    name: str
    bits: float
    weights: float
    velocity: float

    @property
    def text(self) -> str:
        return f"| {self.name} | {self.bits:.4g} | {self.weights:.2%} | {self.velocity:.2%} |"


# --- the K and IQ types, without their bits ------------------------------------------------------------


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _between(bits: int, group: int, scale_bits: int) -> Rounding:
    """Q2_K, Q4_K, Q5_K: numbers from a minimum up, scales and minima of a few bits under two float16 of 256 weights."""

    def rounded(weight: Tensor) -> Tensor:
        x = weight.reshape(-1, 256 // group, group)
        top = 2**scale_bits - 1
        lowest = -x.amin(-1, keepdim=True).clamp(max=0)
        scale = (x.amax(-1, keepdim=True) + lowest) / (2**bits - 1)
        d, m = (_half(part.amax(1, keepdim=True) / top).clamp(min=1e-8) for part in (scale, lowest))
        scale, lowest = d * (scale / d).round().clamp(1, top), m * (lowest / m).round().clamp(0, top)
        q = ((x + lowest) / scale).round().clamp(0, 2**bits - 1)
        return (scale * q - lowest).reshape(weight.shape)

    return rounded


def _around(levels: Tensor, group: int, scale_top: int, block: int = 256) -> Rounding:
    """Q3_K, Q6_K, IQ4: the nearest of given levels, under a scale each group, itself rounded under a float16."""

    def rounded(weight: Tensor) -> Tensor:
        x = weight.reshape(-1, block // group, group)
        far = x.gather(2, x.abs().argmax(-1, keepdim=True))
        scale = far / levels[levels.abs().argmax()]
        if scale_top:
            d = _half(scale.abs().amax(1, keepdim=True) / scale_top).clamp(min=1e-8)
            scale = d * (scale / d).round()
        scale = torch.where(scale == 0, 1e-8, _half(scale) if not scale_top else scale)
        middles = (levels[1:] + levels[:-1]) / 2
        return (scale * levels[torch.bucketize(x / scale, middles)]).reshape(weight.shape)

    return rounded


IQ4 = torch.tensor(IQ4_LEVELS, dtype=torch.float32)
SIMULATED: dict[str, Rounding] = {
    "Q6_K": _around(torch.arange(-32.0, 32.0), 16, 127),
    "Q5_K": _between(5, 32, 6),
    "Q4_K": _between(4, 32, 6),
    "IQ4_NL": _around(IQ4, 32, 0, 32),
    "IQ4_XS": _around(IQ4, 32, 31),
    "Q3_K": _around(torch.arange(-4.0, 4.0), 16, 31),
    "Q2_K": _between(2, 16, 4),
}

# --- the table -----------------------------------------------------------------------------------------


def formats() -> Iterator[tuple[str, float, Callable[[Tensor], Packed | Tensor]]]:
    """Yield name, bits a weight and rounding of every format."""
    yield "bfloat16", 16, lambda w: w.bfloat16().float()
    yield "float16", 16, lambda w: w.half().float()
    for name, kind, scales, bits in (
        ("fp8 e4m3, plain", "fp8_e4m3", "none", 8),
        ("fp8 e5m2, plain", "fp8_e5m2", "none", 8),
        ("fp8 e4m3, a scale per tensor", "fp8_e4m3", "tensor", 8),
        ("fp8 e4m3, a scale per channel (`--quantise fp8`)", "fp8_e4m3", "channel", 8),
        ("fp8 e4m3, a scale per 64 (`--quantise fp8-64`)", "fp8_e4m3", "64", 8.5),
        ("int8, a scale per channel (`--quantise int8`)", "int8", "channel", 8),
    ):
        yield name, bits, lambda w, kind=kind, scales=scales: quantise(w, kind, scales)
    for kind in ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q5_K", "Q4_1", "Q4_0", "Q4_K", "IQ4_NL", "IQ4_XS", "Q3_K", "Q2_K"):
        block = BLOCK_TYPES[kind]
        rounding = SIMULATED.get(kind) or (lambda w, kind=kind: quantise(w, kind))
        yield f"GGUF {kind}{' *' if kind in SIMULATED else ''}", 8 * block.bytes / block.weights, rounding


def demo() -> tuple[WanDiT, Tensor]:
    """Return the shipped model in float32, and its velocity at a fixed input."""
    facts = inspect(Path(str(files("kinema").joinpath("assets/demo/dit.safetensors"))))
    kept = facts.model_dump(include={"component", "files", "dialect", "container", "config", "quantisation"})
    model = load(ModelRef(**kept, dtype="float32"))
    assert isinstance(model, WanDiT)
    return model, velocity(model)


@torch.inference_mode()
def velocity(model: WanDiT) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 5, 8, 8, generator=generator), torch.randn(12, 128, generator=generator)
    concat = torch.zeros(1, 20, 5, 8, 8)
    context = model.prepare(Conditions(text=(text,), concat_BCFhw=concat))
    return model(x, torch.tensor([700.0]), context)  # type: ignore[no-any-return]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def table() -> list[Row]:
    """Return one row a format, and one for fp8 times fp8."""
    model, exact = demo()
    weights = {name: leaf.weight.clone() for name, leaf in packable("dit", model) if isinstance(leaf, nn.Linear)}
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    rows = []
    for name, bits, rounding in formats():
        rounded = {key: rounding(weight) for key, weight in weights.items()}
        numbers = {key: w.dequantised() if isinstance(w, Packed) else w for key, w in rounded.items()}
        for key, value in numbers.items():
            model.get_parameter(key).data.copy_(value)
        changed = torch.cat([value.flatten() for value in numbers.values()])
        rows.append(Row(name, bits, error(changed, everything), error(velocity(model), exact)))
    for key, weight in weights.items():
        model.get_parameter(key).data.copy_(weight)
    channel = next(row.weights for row in rows if "per channel (`--quantise fp8" in row.name)
    for name, matmul in (("in bfloat16", False), ("in bfloat16, multiplied in fp8", True)):
        changed = error(_fp8(weights, matmul), exact)
        rows.append(Row(f"fp8 e4m3, a scale per channel, {name}", 8, channel, changed))
    return rows


def _fp8(weights: dict[str, Tensor], matmul: bool) -> Tensor:
    model, _ = demo()
    for key, weight in weights.items():
        leaf = model.get_submodule(key.removesuffix(".weight"))
        leaf.bias.data = leaf.bias.data.bfloat16()
        swap(model, key, quantise(weight, "fp8_e4m3", "channel"), torch.bfloat16, fp8_matmul=matmul)
    return velocity(model)


def speed() -> Iterator[str]:
    """Yield one line a kind: millions of weights unpacked to bfloat16 a second, one thread."""
    torch.set_num_threads(1)
    weight = torch.randn(1024, 4096) * 0.02
    for kind in ("fp8_e4m3", "fp8_e5m2", "int8", *BLOCK_TYPES):
        block = BLOCK_TYPES.get(kind)
        if block is None or block.quantise:
            packed = quantise(weight, kind, "channel")
        else:
            data = torch.randint(0, 100, (1024, 4096 // block.weights * block.bytes), dtype=torch.uint8)
            packed = Packed(kind, (1024, 4096), data)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            packed.dequantised(torch.bfloat16)
            times.append(time.perf_counter() - start)
        yield f"| {kind} | {weight.numel() / min(times) / 1e6:.0f} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--speed", action="store_true")
    asked = parser.parse_args()
    print("\n".join(row.text for row in table()))
    if asked.speed:
        print("\n".join(speed()))
