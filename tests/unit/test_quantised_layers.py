"""Layers over packed weights: their arithmetic, what they share, and what a cast of the module may not do to them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kinema.models.encoders import T5Linear
from kinema.models.layers import Linear
from kinema.planning.quantisation import CHUNK_BYTES
from kinema.weights.quantised import packed as packing
from kinema.weights.quantised.layers import Activations, QuantisedEmbedding, QuantisedLinear, multiplies, swap
from kinema.weights.quantised.packed import ON_LOAD, Packed, hadamard, quantise

KINDS = [("fp8_e4m3", "none"), ("fp8_e5m2", "none"), ("fp8_e4m3", "tensor"), *ON_LOAD.values(), ("int8", "tensor"),
         ("int8", "64"), ("Q8_0", ""), ("Q4_0", ""), ("Q5_1", "")]  # fmt: skip


def weight(rows: int = 48, columns: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize(("kind", "scales"), KINDS)
def test_a_weight_is_the_same_in_parts_and_in_every_dtype(
    kind: str, scales: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = quantise(weight(), kind, scales)
    whole = packed.dequantised()
    assert torch.equal(packed.dequantised(torch.bfloat16), whole.bfloat16())
    index = torch.tensor([3, 40, 3])
    assert torch.equal(packed.rows(index).dequantised(), whole[index])
    monkeypatch.setattr(packing, "CHUNK", 5 * 128)
    assert torch.equal(packed.dequantised(), whole)


@pytest.mark.parametrize("scales", ["tensor", "channel", "64"])
@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2", "int8"])
def test_scales_use_the_whole_range_and_lose_no_more_than_a_step(kind: str, scales: str) -> None:
    exact = weight()
    exact[0] = 0
    packed = quantise(exact, kind, scales)
    assert packed.data.float().abs().max() == packing.LARGEST[kind]
    step = {"fp8_e4m3": 2**-4, "fp8_e5m2": 2**-3, "int8": 0}[kind]
    floor = packed.scale.amax(-1, keepdim=True) * {"fp8_e4m3": 2**-9, "fp8_e5m2": 2**-16, "int8": 0.5}[kind]  # type: ignore[union-attr]
    assert ((packed.dequantised() - exact).abs() <= 1.001 * (exact.abs() * step + floor)).all()
    assert not packed.dequantised()[0].any()


def test_hadamard_is_the_published_matrix() -> None:
    corner = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).float()
    assert torch.equal(hadamard(4), corner / 2)
    assert torch.equal(hadamard(16), torch.kron(corner, corner) / 4)
    assert torch.allclose(hadamard(256) @ hadamard(256), torch.eye(256), atol=1e-6)


@pytest.mark.parametrize("leaf", [Linear, T5Linear])
def test_a_linear_layer_computes_as_its_unpacked_weight(leaf: type[nn.Linear]) -> None:
    plain = leaf(128, 48)
    for dtype in (torch.float32, torch.bfloat16):
        packed = quantise(weight(), "fp8_e4m3", "channel")
        model = nn.Sequential(leaf(128, 48))
        with torch.no_grad():
            plain.weight.copy_(packed.dequantised())
            model[0].bias = plain.bias
        swap(model, "0.weight", packed, dtype)
        x = torch.randn(2, 5, 128)
        wanted = plain.to(dtype)(x)
        found = model.to(dtype)(x)
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
        plain.float()


def test_a_cast_of_the_module_leaves_packed_numbers_alone() -> None:
    packed = quantise(weight(), "fp8_e4m3", "channel")
    layer = QuantisedLinear(packed, nn.Parameter(torch.ones(48)), torch.bfloat16)
    nn.Sequential(layer).to(torch.bfloat16)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert (layer.data.dtype, layer.scale.dtype) == (torch.float8_e4m3fn, torch.float32)  # type: ignore[union-attr]
    assert torch.equal(layer.dequantised(torch.float32), packed.dequantised())
    nn.Sequential(layer).to("meta")
    assert layer.data.is_meta and layer.scale.is_meta  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["Q8_0", "fp8_e4m3"])
def test_an_embedding_unpacks_the_rows_asked_for(kind: str) -> None:
    packed = quantise(weight(), kind, "channel")
    ids = torch.tensor([[1, 1, 47], [0, 2, 3]])
    assert torch.equal(QuantisedEmbedding(packed, torch.float32)(ids), packed.dequantised()[ids])


# --- fp8 times fp8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scales", ["none", "tensor", "channel"])
def test_fp8_multiplication_is_that_of_rounded_rows(scales: str) -> None:
    packed, bias = quantise(weight(), "fp8_e4m3", scales), torch.randn(48, dtype=torch.bfloat16)
    layer = QuantisedLinear(packed, nn.Parameter(bias, False), torch.bfloat16, activations=Activations())
    x = torch.randn(2, 7, 128) * torch.logspace(-3, 3, 7)[:, None]
    scale = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / scale).to(torch.float8_e4m3fn).float() * scale
    wanted = rounded.double() @ packed.dequantised().double().T + bias
    found = layer(x)
    assert found.shape == (2, 7, 48) and found.dtype == torch.bfloat16
    assert (found - wanted).abs().max() <= 2**-7 * wanted.abs().max()
    rows = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1)
    assert rows.max() < 2**-7, "a row of small numbers must not suffer from a row of large ones"
    assert not layer(torch.zeros(1, 128)).sub(bias).any()


def test_activations_are_rounded_once_for_layers_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = nn.Module()
    for name in "qkvo":
        parent.add_module(name, Linear(128, 48))
        swap(parent, f"{name}.weight", quantise(weight(), "fp8_e4m3", "channel"), torch.bfloat16, fp8_matmul=True)
        getattr(parent, name).bias.data = torch.zeros(48, dtype=torch.bfloat16)
    rounded: list[Tensor] = []
    seen = Tensor.amax
    monkeypatch.setattr(Tensor, "amax", lambda self, *a, **k: (rounded.append(self), seen(self, *a, **k))[1])
    x, other = torch.randn(3, 128), torch.randn(3, 128)
    first = [getattr(parent, name)(x) for name in "qkv"]
    assert len(rounded) == 1
    assert not torch.equal(parent.o(other), first[0]) and len(rounded) == 2
    assert parent.q.activations is parent.o.activations is not None
    del other
    gc.collect()
    assert parent.q.activations._rounded is None, "it lives no longer than the activation"


def test_what_cannot_be_multiplied_is_unpacked() -> None:
    for packed in (
        quantise(weight(), "fp8_e5m2", "channel"),
        quantise(weight(), "int8", "channel"),
        quantise(weight(), "fp8_e4m3", "64"),
        quantise(weight(40), "fp8_e4m3", "channel"),
        Packed("fp8_e4m3", (48, 128), weight().to(torch.float8_e4m3fn), None, 64),
    ):
        assert not multiplies(packed, torch.bfloat16)
        layer = QuantisedLinear(packed, None, torch.bfloat16, activations=Activations())
        assert layer.activations is None
    assert multiplies(quantise(weight(), "fp8_e4m3", "channel"), torch.bfloat16)
    assert not multiplies(quantise(weight(), "fp8_e4m3", "channel"), torch.float32)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive, at most, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and (place := tensor.untyped_storage().data_ptr()) not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(place)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, place, storage.nbytes())
        return made

    def _gone(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


@pytest.mark.parametrize("kind", ["fp8_e4m3", "int8", "Q8_0", "Q4_0"])
def test_a_large_matrix_takes_what_planning_says(kind: str) -> None:
    packed = quantise(torch.randn(8192, 2048), kind, "channel")
    with Live() as live:
        packed.dequantised(torch.bfloat16)
    planned = 8192 * 2048 * 2 + CHUNK_BYTES
    assert 0.6 * planned < live.most < 1.3 * planned, f"{live.most / planned:.2f}"


def test_a_large_activation_is_rounded_in_chunks() -> None:
    x = torch.randn(20_000, 1024).bfloat16()
    with Live() as live:
        numbers, scales = Activations().rounded(x)
    assert (numbers.shape, scales.shape) == (x.shape, (20_000, 1))
    assert live.most - x.nbytes < x.numel() + 1.3 * CHUNK_BYTES  # views of the input count as it
