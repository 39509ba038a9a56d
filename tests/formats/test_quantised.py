"""Quantised files, in every spelling: each loads to the numbers its format stands for, worked out here by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_blocks import random_blocks
from test_load import text_to_transformers
from torch import Tensor, nn

from checkpoints import TINY, official_state, write
from golden_weights import input_tensor
from kinema.errors import CheckpointError
from kinema.models.wan import stays_float32
from kinema.schema import Component, FileFacts, ModelRef
from kinema.tensors import Conditions
from kinema.weights.detect import inspect
from kinema.weights.load import load
from kinema.weights.quantised.blocks import BLOCK_TYPES
from kinema.weights.quantised.layers import QuantisedEmbedding, QuantisedLinear

State = dict[str, Tensor]

DIT = {**TINY["dit"], "num_layers": 1, "dim": 256, "ffn_dim": 512, "text_dim": 256}
TEXT = {**TINY["text_encoder"], "vocab": 64, "dim": 256, "dim_attn": 256, "ffn_dim": 256}
DIT_STATE, TEXT_STATE = official_state("dit", DIT), official_state("text_encoder", TEXT)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def ref_of(facts: FileFacts, dtype: Any = "float32", **changes: Any) -> ModelRef:
    kept = facts.model_dump(include={"component", "files", "dialect", "container", "config", "quantisation"})
    return ModelRef(**{**kept, "dtype": dtype, **changes})


def islands(name: str) -> bool:
    return stays_float32(name) or name.startswith(("text_embedding.", "img_emb."))


def matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.endswith(".weight") and "embedding.embedding" not in name


# --- writers of each spelling: return what goes into the file, and what it stands for ----------------------

Spelling = Callable[[State], tuple[State, State, "dict[str, str]"]]


def plain(dtype: torch.dtype) -> Spelling:
    def spell(state: State) -> tuple[State, State, dict[str, str]]:
        stored = {name: tensor if name.startswith("patch") else tensor.to(dtype) for name, tensor in state.items()}
        return stored, {name: tensor.float() for name, tensor in stored.items()}, {}

    return spell


def scaled(
    dtype: torch.dtype,
    suffix: str,
    *,
    channel: bool = False,
    only: Callable[[str], bool] = lambda name: True,
    extra: Callable[[str], State] = lambda layer: {},
    marker: State | None = None,
    scale_shape: tuple[int, ...] = (),
    wide: torch.dtype = torch.float16,
) -> Spelling:
    """Every matrix `only` wants as number times scale, the rest in `wide`."""

    def spell(state: State) -> tuple[State, State, dict[str, str]]:
        stored: State = dict(marker or {})
        meaning: State = {}
        for name, tensor in state.items():
            if not matrix(name, tensor) or not only(name):
                stored[name] = tensor.to(wide)
                meaning[name] = stored[name].float()
                continue
            layer = name.removesuffix("weight")
            top = 127 if dtype == torch.int8 else torch.finfo(dtype).max
            scale = tensor.abs().amax(1, keepdim=True) / top if channel else tensor.abs().max() / top
            numbers = tensor / scale
            stored[name] = (numbers.round() if dtype == torch.int8 else numbers).to(dtype)
            stored[layer + suffix] = scale if channel else scale.reshape(scale_shape)
            stored |= {layer + ending: value for ending, value in extra(layer).items()}
            meaning[name] = stored[name].float() * scale
        return stored, meaning, {}

    return spell


def described(row: dict[str, Any]) -> Callable[[str], State]:
    raw = json.dumps(row).encode()
    return lambda layer: {"comfy_quant": torch.tensor(list(raw), dtype=torch.uint8)}


def quanto(state: State) -> tuple[State, State, dict[str, str]]:
    stored, meaning, _ = scaled(torch.int8, "weight._scale", channel=True)(state)
    moved = {name: name.replace("._scale", "") for name in stored if name.endswith("._scale")}
    for scale, name in moved.items():
        stored[f"{name}._data"] = stored.pop(name)
        stored[scale.replace("weight._scale", "input_scale")] = torch.ones(())
        stored[scale.replace("weight._scale", "output_scale")] = torch.ones(())
    return stored, meaning, {}


def regular_hadamard(size: int) -> Tensor:
    """Entry (i, j) is -1 to the number of base-4 digits in which i and j add up to 3."""
    index = torch.arange(size)
    signs, rest = torch.ones(size, size), index
    while size > 1:
        signs = torch.where((rest % 4)[:, None] + (rest % 4)[None] == 3, -signs, signs)
        rest, size = rest // 4, size // 4
    return signs / len(index) ** 0.5


def convrot(state: State) -> tuple[State, State, dict[str, str]]:
    row = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    matrices = {name for name, tensor in state.items() if matrix(name, tensor) and not islands(name)}
    turn = regular_hadamard(64)
    turned = {n: (t.unflatten(1, (-1, 64)) @ turn).flatten(1) if n in matrices else t for n, t in state.items()}
    spell = scaled(torch.int8, "weight_scale", channel=True, only=lambda n: not islands(n), extra=described(row))
    stored, meaning, _ = spell(turned)
    for name in matrices:
        meaning[name] = (meaning[name].unflatten(1, (-1, 64)) @ turn.T).flatten(1)
    return stored, meaning, {}


def in_header(state: State) -> tuple[State, State, dict[str, str]]:
    stored, meaning, _ = scaled(E4M3, "weight_scale")(state)
    layers = {n.removesuffix(".weight"): {"format": "float8_e4m3fn"} for n, t in stored.items() if t.dtype == E4M3}
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    return prefixed, meaning, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def in_blocks_of_64(state: State) -> tuple[State, State, dict[str, str]]:
    stored, meaning = {}, {}
    for name, tensor in state.items():
        if not matrix(name, tensor) or islands(name):
            stored[name] = meaning[name] = tensor
            continue
        parts = tensor.unflatten(1, (-1, 64))
        scale = parts.abs().amax(-1) / 448
        numbers = (parts / scale[..., None]).to(E4M3)
        stored[name], stored[name.removesuffix("weight") + "weight_scale"] = numbers.flatten(1), scale
        meaning[name] = (numbers.float() * scale[..., None]).flatten(1)
    return stored, meaning, {}


def musubi(state: State) -> tuple[State, State, dict[str, str]]:
    stored, meaning, _ = in_blocks_of_64(state)
    scales = [name for name in stored if name.endswith("weight_scale")]
    for name in scales:
        stored[name.replace("weight_scale", "scale_weight")] = stored.pop(name)[..., None]
    return stored, meaning, {}


BLOCKS_ONLY: Callable[[str], bool] = lambda name: not islands(name)  # noqa: E731
INPUT = lambda layer: {"scale_input": torch.ones(1)}  # noqa: E731

SPELLINGS: dict[str, tuple[Spelling, str]] = {
    "plain e4m3": (plain(E4M3), "fp8_e4m3 plain"),
    "plain e5m2": (plain(E5M2), "fp8_e5m2 plain"),
    "ComfyUI scale_weight": (
        scaled(E4M3, "scale_weight", marker={"scaled_fp8": torch.zeros(2, dtype=E4M3)}, scale_shape=(1,), extra=INPUT),
        "fp8_e4m3, a scale per tensor, weight only",
    ),
    "Kijai": (
        scaled(E4M3, "scale_weight", only=BLOCKS_ONLY, marker={"scaled_fp8": torch.zeros(0)}, wide=torch.float32),
        "fp8_e4m3, a scale per tensor",
    ),
    "e5m2 scale_weight": (scaled(E5M2, "scale_weight"), "fp8_e5m2, a scale per tensor"),
    "ComfyUI comfy_quant": (
        scaled(E4M3, "weight_scale", extra=described({"format": "float8_e4m3fn"})), "fp8_e4m3, a scale per tensor"
    ),
    "ComfyUI header": (in_header, "fp8_e4m3, a scale per tensor"),
    "LightX2V fp8": (scaled(E4M3, "weight_scale", channel=True, only=BLOCKS_ONLY), "fp8_e4m3, a scale per channel"),
    "LightX2V int8": (scaled(torch.int8, "weight_scale", channel=True, only=BLOCKS_ONLY), "int8, a scale per channel"),
    "block 64": (in_blocks_of_64, "fp8_e4m3, a scale per 64 weights"),
    "musubi": (musubi, "fp8_e4m3, a scale per 64 weights"),
    "rowwise comfy_quant": (
        scaled(E4M3, "weight_scale", channel=True, extra=described({"format": "float8_e4m3fn_rowwise"})),
        "fp8_e4m3, a scale per channel",
    ),
    "int8 convrot": (convrot, "int8 rotated, a scale per channel"),
    "ComfyUI int8": (
        scaled(torch.int8, "weight_scale", extra=described({"format": "int8_tensorwise"})), "int8, a scale per tensor"
    ),
    "quanto int8": (quanto, "int8, a scale per channel"),
}  # fmt: skip


def run(module: nn.Module, component: Component) -> Tensor:
    if component == "text_encoder":
        return module.encode(torch.arange(10)[None])  # type: ignore[operator]
    x, text = input_tensor("x", (1, 20, 2, 4, 4), 1), input_tensor("text", (5, 256), 1)
    conditions = Conditions(text=(text,), clip_BVD=input_tensor("clip", (1, 20, 48), 1),
                            concat_BCFhw=input_tensor("concat", (1, 16, 2, 4, 4), 1))  # fmt: skip
    return module(x, torch.tensor([500.0]), module.prepare(conditions))  # type: ignore[operator]


def check(path: Path, meaning: Mapping[str, Tensor], component: Component, tmp_path: Path, words: str) -> nn.Module:
    """The file must load to the very numbers of `meaning`, packed where it may be, and run like them plain."""
    facts = inspect(path)
    assert facts.quantisation == words
    module = load(ref_of(facts))
    plain_file = write(tmp_path / "plain.safetensors", {n: t.contiguous() for n, t in meaning.items()})
    wanted = load(ref_of(inspect(plain_file)))
    state = dict(wanted.state_dict())
    packed = {
        f"{n}.weight": m for n, m in module.named_modules() if isinstance(m, QuantisedLinear | QuantisedEmbedding)
    }
    assert packed
    assert facts.packed_parameters == sum(layer.dequantised().numel() for layer in packed.values())
    assert facts.packed_bytes == sum(layer.packed.bytes for layer in packed.values())
    for name, layer in packed.items():
        assert component != "dit" or not islands(name)
        assert torch.equal(layer.dequantised(torch.float32), state.pop(name)), name
    found = module.state_dict()
    assert state.keys() == found.keys()
    for name in state:
        assert torch.equal(found[name], state[name]), name
    assert torch.equal(run(module, component), run(wanted, component))
    return module


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_dit_in_every_spelling(tmp_path: Path, name: str) -> None:
    spell, words = SPELLINGS[name]
    stored, meaning, metadata = spell(dict(DIT_STATE))
    path = write(tmp_path / "a.safetensors", {n: t.contiguous() for n, t in stored.items()}, metadata or None)
    check(path, meaning, "dit", tmp_path, words)


@pytest.mark.parametrize("name", ["plain e4m3", "ComfyUI scale_weight", "ComfyUI comfy_quant"])
def test_umt5_in_fp8(tmp_path: Path, name: str) -> None:
    spell, words = SPELLINGS[name]
    state = dict(TEXT_STATE)
    table = state.pop("token_embedding.weight").half()
    stored, meaning, _ = spell(state)
    stored, meaning = stored | {"token_embedding.weight": table}, meaning | {"token_embedding.weight": table.float()}
    if name != "plain e4m3":
        stored = text_to_transformers(stored)
    path = write(tmp_path / "a.safetensors", {n: t.contiguous() for n, t in stored.items()})
    check(path, meaning, "text_encoder", tmp_path, words)


# --- what a file says of multiplying in fp8 -----------------------------------------------------------------


def marked(marker: Tensor, name: str = "scaled_fp8") -> Spelling:
    return scaled(E4M3, "scale_weight", marker={name: marker})


def full_precision_ffn(layer: str) -> State:
    row = {"format": "float8_e4m3fn", "full_precision_matrix_mult": ".ffn." in layer}
    return described(row)(layer)


def header_of_ffn(state: State) -> tuple[State, State, dict[str, str]]:
    stored, meaning, metadata = in_header(state)
    said = json.loads(metadata["_quantization_metadata"])
    for layer in said["layers"]:
        said["layers"][layer]["full_precision_matrix_mult"] = ".ffn." in layer
    return stored, meaning, {"_quantization_metadata": json.dumps(said)}


ATTENTION_ONLY: Callable[[str], bool] = lambda name: ".ffn." not in name  # noqa: E731
MULTIPLIED: dict[str, tuple[Spelling, Callable[[str], bool]]] = {
    "no marker": (scaled(E4M3, "scale_weight"), lambda name: True),
    "a marker of one element": (marked(torch.zeros(1, dtype=E4M3)), lambda name: True),
    "an empty marker in float32": (marked(torch.zeros(0)), lambda name: True),
    "a marker of two elements": (marked(torch.zeros(2, dtype=E4M3)), lambda name: False),
    "a marker of e5m2": (marked(torch.zeros(0, dtype=E5M2)), lambda name: False),
    "another part's marker": (marked(torch.zeros(2, dtype=E4M3), "text_encoders.scaled_fp8"), lambda name: True),
    "comfy_quant": (scaled(E4M3, "weight_scale", extra=full_precision_ffn), ATTENTION_ONLY),
    "header": (header_of_ffn, ATTENTION_ONLY),
}
"""Spelling -> which of its layers may be multiplied in fp8."""


@pytest.mark.parametrize("name", MULTIPLIED)
def test_layers_that_a_file_keeps_from_fp8_multiplication_are_unpacked(tmp_path: Path, name: str) -> None:
    spell, may = MULTIPLIED[name]
    stored, _, metadata = spell(dict(DIT_STATE))
    path = write(tmp_path / "a.safetensors", {n: t.contiguous() for n, t in stored.items()}, metadata or None)
    facts = inspect(path)
    module = load(ref_of(facts, "bfloat16", fp8_matmul=True))
    layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantisedLinear)}
    assert {path for path, layer in layers.items() if layer.activations} == {path for path in layers if may(path)}
    assert ("weight only" in facts.quantisation) == (not all(map(may, layers)))
    x = torch.randn(3, 256).bfloat16()
    layer = layers["blocks.0.ffn.0"]
    unpacked = torch.nn.functional.linear(x, layer.dequantised(), layer.bias)
    assert torch.equal(layer(x), unpacked) is not may("blocks.0.ffn.0")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"format": "float8_e4m3fn", "zero_point": 3}, "float8_e4m3fn with zero_point"),
        ({"format": "int8_blockwise", "group_size": 128}, "int8_blockwise"),
        ({"format": "float8_e4m3fn", "params": {"convrot": True, "convrot_groupsize": 48}}, "groups of 48"),
    ],
)
def test_a_description_that_says_more_than_is_known_is_refused(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    stored, _, _ = scaled(E4M3, "weight_scale", extra=described(row))(dict(DIT_STATE))
    with pytest.raises(CheckpointError, match=words):
        inspect(write(tmp_path / "a.safetensors", {n: t.contiguous() for n, t in stored.items()}))


# --- GGUF ------------------------------------------------------------------------------------------------


def write_gguf(path: Path, state: Mapping[str, Tensor], kinds: Callable[[str, Tensor], str]) -> State:
    """Write a file by the gguf package, quantised by it or of random valid blocks; return what it stands for."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_array("some.list", [1, 2, 3])
    writer.add_array("some.words", ["a", "b"])
    meaning: State = {}
    for number, (name, tensor) in enumerate(state.items()):
        kind = kinds(name, tensor)
        named = gguf.GGMLQuantizationType[kind]
        if kind in BLOCK_TYPES and BLOCK_TYPES[kind].quantise is None:
            count = tensor.numel() // BLOCK_TYPES[kind].weights
            raw = random_blocks(kind, count, number, 0.001).reshape(len(tensor), -1)
        else:
            raw = gguf.quantize(tensor.numpy(), named)
        writer.add_tensor(name, raw, raw_dtype=named)
        meaning[name] = torch.from_numpy(np.array(gguf.dequantize(raw, named))).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


def mixed(kind: str) -> Callable[[str, Tensor], str]:
    """What the public converter does: matrices of blocks quantised, the rest F32 or F16, the patch embedding F32."""
    return lambda name, tensor: (
        kind if matrix(name, tensor) and not islands(name) else "F16" if tensor.ndim == 1 else "F32"
    )


@pytest.mark.parametrize("kind", [*BLOCK_TYPES, "F16", "BF16"])
def test_a_dit_in_every_gguf_type(tmp_path: Path, kind: str) -> None:
    meaning = write_gguf(tmp_path / "a.gguf", dict(DIT_STATE), mixed(kind))
    facts = inspect(tmp_path / "a.gguf")
    assert (facts.container, facts.config) == ("gguf", DIT)
    if kind in BLOCK_TYPES:
        check(tmp_path / "a.gguf", meaning, "dit", tmp_path, kind)
    else:
        assert facts.quantisation == ""
        state = load(ref_of(facts)).state_dict()
        assert all(torch.equal(state[name], meaning[name]) for name in state)


LLAMA = (
    ("token_embedding", "token_embd"), ("blocks.", "enc.blk."), (".attn.", ".attn_"),
    ("pos_embedding.embedding", "attn_rel_b"), ("norm1", "attn_norm"), ("norm2", "ffn_norm"),
    ("ffn.gate.0", "ffn_gate"), ("ffn.fc1", "ffn_up"), ("ffn.fc2", "ffn_down"),
)  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_umt5_in_gguf_names(tmp_path: Path, kind: str) -> None:
    renamed = {}
    for name, tensor in dict(TEXT_STATE).items():
        for official, llama in LLAMA:
            name = name.replace(official, llama)
        renamed["enc.output_norm.weight" if name == "norm.weight" else name] = (tensor, name)
    meaning = write_gguf(
        tmp_path / "a.gguf",
        {name: tensor for name, (tensor, _) in renamed.items()},
        lambda name, tensor: "F32" if tensor.ndim == 1 or "rel_b" in name else kind,
    )
    official = dict(zip(dict(TEXT_STATE), meaning.values(), strict=True))
    module = check(tmp_path / "a.gguf", official, "text_encoder", tmp_path, kind)
    assert isinstance(module.token_embedding, QuantisedEmbedding)


def test_an_original_shape_is_honoured(tmp_path: Path) -> None:
    state = dict(DIT_STATE)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "wan")
    for name, tensor in state.items():
        flat = name == "patch_embedding.weight"
        writer.add_tensor(name, tensor.flatten(1).numpy() if flat else tensor.numpy())
        if flat:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(
        load(ref_of(inspect(tmp_path / "a.gguf"))).patch_embedding.weight, state["patch_embedding.weight"]
    )


def good_gguf(path: Path, original: Sequence[int] = ()) -> bytes:
    writer = gguf.GGUFWriter(path, "wan")
    if original:
        writer.add_array("comfy.gguf.orig_shape.a.weight", original)
    writer.add_tensor("a.weight", gguf.quantize(np.ones((2, 32), np.float32), gguf.GGMLQuantizationType.Q8_0),
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(("original", "shape"), [([4, 16], (4, 16)), ([-2, -32], (2, 32)), ([0.5, 128.0], (2, 32))])
def test_an_original_shape_is_whole_numbers_or_none(
    tmp_path: Path, original: list[int], shape: tuple[int, ...]
) -> None:
    from kinema.weights.files import open_tensors

    good_gguf(tmp_path / "a.gguf", original)
    assert open_tensors(tmp_path / "a.gguf").shape("a.weight") == shape


def test_damaged_gguf_files_are_errors(tmp_path: Path) -> None:
    from kinema.weights.files import open_tensors

    raw = good_gguf(tmp_path / "good.gguf")
    nearly_one = 127 * float(np.float16(1 / 127))
    assert torch.equal(open_tensors(tmp_path / "good.gguf").get("a.weight"), torch.full((2, 32), nearly_one))
    bad = tmp_path / "bad.gguf"
    for length in range(4, len(raw) - 32, 7):  # the last bytes only pad
        bad.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=r"truncated|corrupt"):
            open_tensors(bad)
    at = raw.index(b"a.weight") + 8
    for change, words in (
        (raw[: at + 20] + (19).to_bytes(4, "little") + raw[at + 24 :], "of GGUF type IQ1_S, which is not read"),
        (raw[: at + 4] + (31).to_bytes(8, "little") + raw[at + 12 :], "no multiple of 32"),
        (raw[:at] + (99).to_bytes(4, "little") + raw[at + 4 :], "has 99 axes"),
        (raw[:4] + (3).to_bytes(4, "big") + raw[8:], "big end first"),
        (raw[:8] + (2**60).to_bytes(8, "little") + raw[16:], "truncated|corrupt"),
    ):
        bad.write_bytes(change)
        with pytest.raises(CheckpointError, match=words):
            open_tensors(bad)
