"""Where a value stopped being finite: asked only after a step's result was found not to be. Costs nothing before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite(model: nn.Module, x_BCFhw: Tensor, timesteps_B: Tensor, context: Any) -> str | None:
    """Run the forward once more and name the first layer whose output is not finite, or None if all are.

    Names are those of the state dict ("blocks.3.ffn.2"); "input of NAME" means that arithmetic between layers, such as
    attention, spoilt it; "latents", "timesteps" and "context" mean that it came in spoilt.
    """
    for name, value in (("latents", x_BCFhw), ("timesteps", timesteps_B), ("context", context)):
        if not _finite(value):
            return name
    found: list[str] = []

    def watch(name: str, module: nn.Module) -> list[Any]:
        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not found and not _finite(args):
                found.append(f"input of {name}")

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    hooks: list[Any] = []
    try:
        for name, module in model.named_modules():
            if module is not model:
                hooks += watch(name, module)
        output = model(x_BCFhw, timesteps_B, context)
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not _finite(output):
        return "output"
    return found[0] if found else None


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
