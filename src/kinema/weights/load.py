"""A recipe of files becomes a module: built without memory, filled with mapped tensors, checked to be exactly it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.errors import CheckpointError
from kinema.models.layers import HELD_AS
from kinema.models.tokenizer import Tokenizer
from kinema.models.wan import constant
from kinema.schema import Component, ModelRef
from kinema.weights.files import open_tensors
from kinema.weights.keys import Translation, translate
from kinema.weights.lora.fuse import Fusion, fusion_of
from kinema.weights.quantised.layers import packable, swap
from kinema.weights.quantised.packed import ON_LOAD, Packed, quantise
from kinema.weights.quantised.schemes import describe, open_weights
from kinema.weights.structure import MODELS, Shapes, build, check


def load(ref: ModelRef, fused: Fusion | None = None) -> nn.Module:
    """Return the module of a recipe, in eval mode and without gradients, on `ref.device`.

    On the CPU, tensors already of the right dtype stay mapped: they cost no memory of their own until they are used,
    and then only page cache. Others are converted one by one, so that there is never a second copy of the model.
    Where blocks are streamed, all of it stays mapped on any device, as stored: the block runner brings and converts
    what is in blocks, and `settle` the rest.
    LoRAs to be fused are added in float32 before that, on the way; `fused`, made by `fusion_of`, knows afterwards by
    how much they changed the weights.
    Raises CheckpointError for missing, left-over or misshapen tensors.
    """
    file = open_weights(ref.files)
    translation = translate(file, ref.component)
    if translation.dialect.component != ref.component:
        found, wanted = MODELS[translation.dialect.component].what, MODELS[ref.component].what
        raise CheckpointError(f"{file.path} is {found}, not {wanted}", path=file.path, expected=wanted, found=found)
    shapes = Shapes(translation)
    module = build(ref.component, ref.config)
    room = _room(ref, shapes)
    check(shapes, module)
    fused = fused or fusion_of(ref)
    names = list(module.state_dict())
    dtype, keeps = getattr(torch, ref.dtype), MODELS[ref.component].stays_float32
    mapped = {name for name, _ in module.named_parameters() if ref.resident_blocks is not None}
    place = "cpu" if mapped else ref.device
    for name, packed in _packed_weights(ref, translation, module, fused):
        swap(module, name, packed.to(place), dtype, fp8_matmul=ref.fp8_matmul)
        names.remove(name)

    def value(name: str) -> Tensor:
        """The tensor where it is wanted. Moved before it is unpacked or converted: the faster device does that."""
        wanted = torch.float32 if keeps(name) else dtype
        if name not in room and (packed := translation.packed(name)) is not None:
            return packed.to(place).dequantised(wanted)
        tensor = _value(translation, name)
        if name in mapped and name not in fused and name not in room:
            return tensor
        tensor = tensor.to(place)
        if name in room:
            tensor = F.pad(tensor, (0, room[name]))
        tensor = fused(name, tensor)
        return tensor.to(wanted) if tensor.is_floating_point() else tensor

    module.load_state_dict({name: value(name) for name in names}, strict=True, assign=True)
    for name, tensor in module.named_parameters():
        if name in mapped and tensor.is_floating_point():
            setattr(tensor, HELD_AS, torch.float32 if keeps(name) else dtype)
    unfilled = [name for name, tensor in chain(module.named_parameters(), module.named_buffers()) if tensor.is_meta]
    assert not unfilled, f"{type(module).__name__} made {unfilled[:3]} outside its state dict on the meta device"
    return module.requires_grad_(False).eval()


@torch.no_grad()
def settle(module: nn.Module, ref: ModelRef) -> None:
    """Bring what a model with streamed blocks has outside of them to its device, in the dtype it is used in.

    The table of tokens stays on the host, as its file stores it. What is there already stays as it is.
    """
    if ref.resident_blocks is None:
        return
    groups: list[list[nn.Module]] = module.block_groups()  # type: ignore[operator]
    elsewhere = [part for group in groups for part in group] + [getattr(module, "token_embedding", nn.Identity())]
    inside = {inner for part in elsewhere for inner in part.modules()}
    owners: Iterator[dict[str, Any]] = (
        owner for part in module.modules() if part not in inside for owner in (part._parameters, part._buffers)
    )
    for owner in owners:
        for name, tensor in owner.items():
            if tensor is not None:
                there = tensor.to(ref.device).to(getattr(tensor, HELD_AS, tensor.dtype))
                if there is not tensor:
                    owner[name] = nn.Parameter(there, False) if isinstance(tensor, nn.Parameter) else there


def _room(ref: ModelRef, shapes: Shapes) -> dict[str, int]:
    """Return how many columns of zeros a weight gets because the plan wants more input channels than the file has.

    FLUX's control LoRAs were trained so. The shapes then are those with the columns.
    """
    name = "img_in.weight"
    if ref.component != "flux_dit" or name not in shapes:
        return {}
    rows, columns = shapes.table[name]
    wanted = 4 * ref.config["in_channels"]
    if wanted <= columns:
        return {}
    shapes.table[name] = (rows, wanted)
    return {name: wanted - columns}


def _packed_weights(
    ref: ModelRef, translation: Translation, module: nn.Module, fused: Fusion
) -> Iterator[tuple[str, Packed]]:
    """Yield the weights that are held packed: as the file has them, or rounded now where the recipe says so."""
    file, stored = translation.file, describe(translation.file, translation.names)
    if ref.quantisation not in (stored, *(ON_LOAD if not stored else ())):
        raise CheckpointError(
            f"{file.path} holds {stored or 'plain weights'}, not {ref.quantisation or 'plain weights'} as planned",
            "The file has changed since; plan again.",
            path=file.path,
            expected=ref.quantisation,
            found=stored,
        )
    for name, leaf in list(packable(ref.component, module)):
        if stored and (packed := translation.packed(name)) is not None:
            yield name, packed
        elif not stored and ref.quantisation and isinstance(leaf, nn.Linear):
            weight = fused(name, translation.read(name).to(ref.device))
            yield name, quantise(weight, *ON_LOAD[ref.quantisation])


def load_tokenizer(encoder: Sequence[Path], tokenizer: Path | None, component: Component = "text_encoder") -> Tokenizer:
    """Return the tokenizer at `tokenizer`, or without one that inside the text encoder's files."""
    if tokenizer is not None:
        found = Tokenizer.from_path(tokenizer)
    else:
        file = open_tensors(encoder)
        inside = file.tokenizer() if file.tokenizer else file.get("spiece_model").numpy().tobytes()
        found = Tokenizer.from_bytes(inside)
    found.cleans = component != "t5"
    return found


def _value(translation: Translation, name: str) -> Tensor:
    """The file's tensor; where it leaves out one that never varies, that."""
    given = translation.read(name) if name in translation.sources else constant(name)
    assert given is not None, f"{name} is missing, which the check should have found"
    return given
