"""LoRA on a loaded model: beside its weights, which nothing ever writes to, and off again.

Every leaf Linear with a change is wrapped; other parameters (norms, modulation, convolutions) get a parametrization,
computed where they are read. Strengths are numbers on those modules, so they may change between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kinema.errors import CheckpointError
from kinema.lora import LoraRef
from kinema.models.layers import HELD_AS
from kinema.weights.lora.branches import Branch
from kinema.weights.lora.file import Change, LoraFile, read_lora
from kinema.weights.lora.match import match
from kinema.weights.quantised.layers import QuantisedLinear


@dataclass(frozen=True)
class Place:
    """Whose change it is, and where it acts: rows of the weight, or of the bias."""

    lora: int
    start: int
    rows: int
    on_bias: bool = False


class LoraLinear(nn.Module):
    """A leaf Linear, plain or quantised, with LoRA beside it: base(x) + sum of strength * branch(x)."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.branches = nn.ModuleList()
        self.places: list[Place] = []
        self.strengths: tuple[float, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def add(self, branch: Branch, place: Place) -> None:
        self.branches.append(branch)
        self.places.append(place)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for branch, place in zip(self.branches, self.places, strict=True):
            strength = self.strengths[place.lora]
            if strength == 0:
                continue
            part: Tensor = branch.delta() if place.on_bias else branch(x, partial(self._rows, place))  # type: ignore[operator]
            # torch adds bfloat16 in float32 and rounds once; the answer of the base is nobody else's yet.
            y.narrow(-1, place.start, place.rows).add_(part.to(y.dtype), alpha=strength)
        return y

    def _rows(self, place: Place, x: Tensor) -> Tensor:
        """The answer of these rows of the weight alone."""
        y: Tensor = self.base(x)
        return (y if self.bias is None else y - self.bias).narrow(-1, place.start, place.rows)


class ChangedParameter(nn.Module):
    """Parametrization of one parameter: itself plus the sum of strength * change, in float32, rounded once."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        self.loras: list[int] = []
        self.strengths: tuple[float, ...] = ()

    def add(self, branch: Branch, place: Place) -> None:
        self.branches.append(branch)
        self.loras.append(place.lora)

    def forward(self, original: Tensor) -> Tensor:
        strengths = [self.strengths[lora] if self.strengths else 0.0 for lora in self.loras]
        if not any(strengths):
            return original
        weight = original.float()
        total = weight
        for branch, strength in zip(self.branches, strengths, strict=True):
            total = total + strength * branch.change(as_matrix(weight)).view_as(weight)  # type: ignore[operator]
        return total.to(original.dtype)


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight as its changes see it: [out, everything else]; vectors as they are."""
    return weight.flatten(1) if weight.ndim > 1 else weight


def attach(model: nn.Module, loras: Sequence[LoraRef], dtype: torch.dtype) -> tuple[float, ...]:
    """Put LoRAs beside the weights of a model that has none, at strength 0; return how large each change is.

    dtype   of the branches beside quantised layers; beside plain ones it is that of their weight.

    The size is the Frobenius norm of all a LoRA changes at strength 1, over that of the weights it changes.
    Raises CheckpointError for files that are damaged, hold values that are not finite, or change nothing here; the
    model is then as it was.
    """
    shapes = parameter_shapes(model)
    try:
        sizes = tuple(_attach(model, read_lora(ref.path), ref, index, shapes, dtype) for index, ref in enumerate(loras))
        check_effect(loras, sizes)
    except BaseException:
        detach(model)
        raise
    set_strengths(model, (0.0,) * len(loras))
    return sizes


def _attach(
    model: nn.Module, lora: LoraFile, ref: LoraRef, index: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> float:
    """Attach one LoRA; return the size of its change."""
    changed = total = 0.0
    for change in chosen(lora, ref, shapes):
        part, whole = _attach_one(model, lora, change, index, dtype)
        check_finite(lora, change, part)
        changed, total = changed + part**2, total + whole**2
    return (changed / total) ** 0.5 if total else 0.0


def check_effect(loras: Sequence[LoraRef], sizes: Sequence[float]) -> None:
    """Raise CheckpointError for a LoRA whose change has no size."""
    if idle := [ref for ref, size in zip(loras, sizes, strict=True) if size == 0]:
        raise CheckpointError(
            f"{idle[0].path} changes nothing: its matrices, or its alpha, are zero",
            "It was saved before it was trained; take another.",
            path=idle[0].path,
        )


def check_finite(lora: LoraFile, change: Change, norm: float) -> None:
    """Raise CheckpointError for a change whose norm is not a number."""
    if not math.isfinite(norm):
        raise lora.error(
            f"its change of {change.target} holds values that are not finite",
            "The file is broken, or was saved in float16 and overflowed; take another.",
            key=change.target,
        )


def chosen(lora: LoraFile, ref: LoraRef, shapes: dict[str, tuple[int, ...]]) -> list[Change]:
    """Return the changes of a LoRA that have a place in a model and that its layer patterns choose."""
    changes = [change for change in match(lora, shapes).changes if ref.selects(change.target)]
    if not changes:
        raise lora.error("it changes nothing in this model", "Take the LoRA that belongs to it.")
    return changes


def detach(model: nn.Module) -> None:
    """Take every LoRA off: the very modules and tensors that were there before are there again."""
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module.base)
    for module in list(model.modules()):
        for name, found in _parametrized(module).items():
            if isinstance(found[0], ChangedParameter):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)


def set_strengths(model: nn.Module, strengths: Sequence[float]) -> None:
    """Set the strength of every LoRA, in the order in which they were attached."""
    for module in model.modules():
        if isinstance(module, LoraLinear | ChangedParameter):
            module.strengths = tuple(strengths)


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by official name, packed weights as they would be unpacked."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            shapes[f"{path}.weight"] = (module.out_features, module.in_features)
    return shapes


def _attach_one(
    model: nn.Module, lora: LoraFile, change: Change, index: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Attach one change; return the norms of the change and of what it changes."""
    path, _, name = change.target.rpartition(".")
    owner = model.get_submodule(path)
    layer = owner.base if isinstance(owner, LoraLinear) else owner
    linear = isinstance(layer, nn.Linear | QuantisedLinear)
    value = layer.dequantised() if isinstance(layer, QuantisedLinear) and name == "weight" else _original(layer, name)
    start, rows = change.rows(value.shape[0])
    before = as_matrix(value.detach().float()).narrow(0, start, rows)
    if not linear:
        dtype = torch.float32
    elif isinstance(layer, nn.Linear):
        dtype = getattr(layer.weight, HELD_AS, layer.weight.dtype)
    branch = lora.branch(change, before, dtype, value.device)
    place = Place(index, start, rows, on_bias=name == "bias")
    if linear:
        if not isinstance(owner, LoraLinear):
            owner = LoraLinear(layer)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, owner)
        owner.add(branch, place)
    else:
        if name not in _parametrized(owner):
            parametrize.register_parametrization(owner, name, ChangedParameter(), unsafe=True)
        _parametrized(owner)[name][0].add(branch, place)  # type: ignore[operator]
    return branch.norm(before), float(before.norm())


def _original(module: nn.Module, name: str) -> Tensor:
    known = _parametrized(module).get(name)
    value = getattr(module, name) if known is None else known.original
    assert isinstance(value, Tensor)
    return value


def _parametrized(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    if not parametrize.is_parametrized(module):
        return {}
    return dict(module.parametrizations.items())  # type: ignore[operator, union-attr]
