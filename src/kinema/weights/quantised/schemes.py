"""How publishers mark quantised weights: their extra tensors and metadata, read into packed weights.

Owns the spellings. A file goes in as it is named on disk and comes out with one name a weight, packed or plain; what is
neither is refused, never read as plain numbers.
Source: ComfyUI's two fp8 generations (scale_weight; weight_scale with comfy_quant or _quantization_metadata) and its
`convert_old_quants`, ModelTC/LightX2V tools/convert (weight_scale, one a row), kohya-ss/musubi-tuner --fp8_scaled
(scale_weight, one for 64), quanto's state dicts (weight._data, weight._scale).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from kinema.errors import CheckpointError
from kinema.weights.files import TensorFile, open_tensors
from kinema.weights.mapped import StoredTensor
from kinema.weights.quantised.packed import NUMBER_TYPES
from kinema.weights.quantised.stored import StoredPacked

KINDS = {dtype: kind for kind, dtype in NUMBER_TYPES.items()}
SCALES = (("scale_weight", "weight"), ("weight_scale", "weight"), ("weight._scale", "weight"))
"""Names, after a layer's own, of the scale and of the weight it belongs to."""

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DATA = "._data"
METADATA = "_quantization_metadata"
FORMATS = {
    "float8_e4m3fn": "fp8_e4m3",
    "float8_e4m3fn_rowwise": "fp8_e4m3",
    "float8_e5m2": "fp8_e5m2",
    "int8_tensorwise": "int8",
}
"""What `comfy_quant` and the metadata call the kinds that are read."""

DESCRIBED = {
    "format",
    "convrot",
    "convrot_groupsize",
    "full_precision_matrix_mult",
    "orig_dtype",
    "orig_shape",
    "params",
}
"""What a description may say; of anything else it is not known what it does to the numbers."""

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")

ACTIVATIONS = re.compile(r".*\.(scale_input|input_scale|output_scale)")
"""Calibrated scales of activations. Ours are taken from each activation, so these are of no use."""

MARKER = re.compile(r"(.*\.)?scaled_fp8")
"""ComfyUI's first fp8: two elements, or e5m2, say that no weight beside it is to be multiplied in fp8."""

UNREAD = (
    (r".*\.comfy_quant", "ComfyUI's second fp8 and int8 format"),
    (r".*\.scale_weight", "scaled fp8 whose weight is missing or is no fp8"),
    (r".*\.weight_scale_2", "nvfp4"),
    (r".*\.weight_scale", "a scale whose weight is missing or is neither fp8 nor int8"),
    (r".*\.(quant_state|absmax|quant_map|nested_absmax).*", "bitsandbytes"),
    (r".*\.(qweight|qzeros|wscales|g_idx)", "int4 (GPTQ, AWQ or SVDQuant)"),
    (r".*\.pre_quant_scale", "smoothed, its inputs to be scaled as well"),
    (r".*\.weight\._.+", "quanto, other than its int8 and fp8"),
)
"""Names that show a quantisation which is not read, once those that are have been taken out."""


def open_weights(path: Path | str | Sequence[Path]) -> TensorFile:
    """Open a checkpoint as `open_tensors` does, its quantised weights as packed ones under their plain names.

    What only described them is left out. Raises CheckpointError also for a quantisation that is not known.
    """
    file = open_tensors(path)
    stored = file.stored()
    formats = _formats(file)
    scales = _scales(file, stored)
    markers = [name for name in stored if MARKER.fullmatch(name)]
    opted_out = tuple(name.removesuffix("scaled_fp8") for name in markers if _opts_out(stored[name]))
    taken = {name for name in stored if ACTIVATIONS.fullmatch(name)}.union(markers, scales.values())
    taken |= {name for name in stored if name.endswith(".comfy_quant") and name.removesuffix("comfy_quant") in formats}
    tensors: dict[str, Any] = {}
    for name, tensor in stored.items():
        if name in taken:
            continue
        kind = KINDS.get(tensor.dtype)
        weight = name.removesuffix(DATA)
        scale = scales.get(weight)
        if kind is None or isinstance(tensor, StoredPacked):
            tensors[name] = tensor
            continue
        said = formats.pop(weight.removesuffix("weight"), Described(kind))
        if said.kind != kind:
            _refuse(file, name, f"{said.kind} by its description and {kind} by its dtype")
        if scale is None and kind == "int8":
            _refuse(file, name, "int8 without a scale")
        if isinstance(held := stored.get(scale or ""), StoredPacked):
            _refuse(file, name, "a scale that is packed itself")
        weight_only = said.weight_only or name.startswith(opted_out)
        packed = StoredPacked(kind, tensor.shape, tensor, held, said.rotation, weight_only)
        _check(file, weight, packed)
        tensors[weight] = packed
    if markers and not any(isinstance(tensor, StoredPacked) for tensor in tensors.values()):
        _refuse(file, markers[0], "scaled fp8 without any fp8 weight")
    if formats:
        _refuse(file, next(iter(formats)), "a description without its weight")
    for name in tensors:
        if what := next((what for pattern, what in UNREAD if re.fullmatch(pattern, name)), None):
            _refuse(file, name, what)
    return TensorFile(file.path, file.files, file.container, tensors, file.metadata, file.tokenizer)


def describe(file: TensorFile, names: Iterable[str]) -> str:
    """Return in a few words how the packed ones of these tensors are held, the commonest first; "" for plain ones."""
    stored, found = file.stored(), Counter[str]()
    for tensor in (stored[name] for name in names):
        if isinstance(tensor, StoredPacked):
            found[_words(tensor)] += tensor.data.bytes
    return " + ".join(words for words, _ in found.most_common())


def _words(tensor: StoredPacked) -> str:
    if tensor.kind not in NUMBER_TYPES:
        return tensor.kind
    turned, opted_out = " rotated" if tensor.rotation else "", ", weight only" if tensor.weight_only else ""
    if tensor.scale is None:
        return f"{tensor.kind} plain{opted_out}"
    count = tensor.scale.bytes // tensor.scale.dtype.itemsize
    parts = count // max(1, tensor.shape[0])
    per = "tensor" if count == 1 else "channel" if parts == 1 else f"{tensor.shape[-1] // parts} weights"
    return f"{tensor.kind}{turned}, a scale per {per}{opted_out}"


def _opts_out(marker: StoredTensor | StoredPacked) -> bool:
    return math.prod(marker.shape) == 2 or marker.dtype == torch.float8_e5m2


def _scales(file: TensorFile, stored: Mapping[str, Any]) -> dict[str, str]:
    """Name of the scale of each packed weight, by the weight's plain name."""
    found: dict[str, str] = {}
    for name in stored:
        for ending, weight in SCALES:
            layer = name.removesuffix(ending)
            if layer == name or (layer and not layer.endswith(".")):
                continue
            data = f"{layer}{weight}" + (DATA if ending == "weight._scale" else "")
            if data in stored and stored[data].dtype in KINDS:
                if f"{layer}{weight}" in found:
                    _refuse(file, name, "two scales for one weight")
                found[f"{layer}{weight}"] = name
    return found


@dataclass(frozen=True)
class Described:
    """What a file says of one layer's weight, beside its numbers: fields as of StoredPacked."""

    kind: str
    rotation: int = 0
    weight_only: bool = False


def _formats(file: TensorFile) -> dict[str, Described]:
    """What is said of a layer, by its name with its dot, where ComfyUI's second format describes it."""
    described: dict[str, Any] = {}
    try:
        if METADATA in file.metadata:
            layers = json.loads(file.metadata[METADATA])["layers"]
            described = {_layer(file, layer): row for layer, row in layers.items()}
        for name in file:
            if name.endswith(".comfy_quant") and file.dtype(name) == torch.uint8:
                described[name.removesuffix("comfy_quant")] = json.loads(bytes(file.get(name).flatten().tolist()))
        return {layer: _format(file, layer, row) for layer, row in described.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path} is quantised in ComfyUI's second format, and its description is not readable ({error})",
            "Download it again.",
            path=file.path,
        ) from error


def _layer(file: TensorFile, layer: str) -> str:
    """The layer's name in the file, with its dot: descriptions may leave a prefix out."""
    return next((f"{prefix}{layer}." for prefix in PREFIXES if f"{prefix}{layer}.weight" in file), f"{layer}.")


def _format(file: TensorFile, layer: str, row: Mapping[str, Any]) -> Described:
    row = {**row.get("params", {}), **row}
    name = row.get("format")
    if name not in FORMATS:
        _refuse(file, layer.removesuffix("."), f"{name} in ComfyUI's second format")
    if unknown := sorted(row.keys() - DESCRIBED):
        _refuse(file, layer.removesuffix("."), f"{name} with {', '.join(unknown)} in ComfyUI's second format")
    rotation = int(row.get("convrot_groupsize", 256)) if row.get("convrot") else 0
    if rotation and (rotation < 4 or 4 ** (rotation.bit_length() // 2) != rotation):
        _refuse(file, layer.removesuffix("."), f"rotated in groups of {rotation}, which is no power of 4")
    return Described(FORMATS[str(name)], rotation, bool(row.get("full_precision_matrix_mult")))


def _check(file: TensorFile, name: str, packed: StoredPacked) -> None:
    """Refuse a weight whose scale or rotation does not fit its shape."""
    shape, scale = packed.shape, packed.scale
    if scale is not None:
        rows, count = scale.shape[:1] == shape[:1], math.prod(scale.shape)
        flat = len(scale.shape) < 3 or scale.shape[2:] == (1,)  # musubi-tuner's blocks have an axis of size 1 behind
        fits = count == 1 or (len(shape) == 2 and rows and flat and count > 0 and shape[1] % (count // shape[0]) == 0)
        if not fits or scale.dtype not in SCALE_DTYPES:
            _refuse(file, name, f"a scale of shape {list(scale.shape)} for a weight of shape {list(shape)}")
    if packed.rotation and (len(shape) != 2 or shape[1] % packed.rotation):
        _refuse(file, name, f"rotated in groups of {packed.rotation}, which its {list(shape)} does not divide into")


def _refuse(file: TensorFile, name: str, what: str) -> NoReturn:
    raise CheckpointError(
        f"{file.path} is quantised: {what} (its {name!r} shows it), and is not read as plain weights",
        "Take the fp16, bf16, scaled fp8 or GGUF file of the same model.",
        path=file.path,
        key=name,
        found=what,
    )
