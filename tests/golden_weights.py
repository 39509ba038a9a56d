"""Rebuild weights and inputs of the golden files, as tests/golden/README.md defines them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (spec, tensors) of one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return json.loads(file.metadata()["spec"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def uniform(name: str, shape: Sequence[int], salt: int) -> Tensor:
    """float32 in [-1, 1), a function of name, shape and salt alone."""
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64)
        z = z + np.uint64(zlib.crc32(name.encode()) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF)
        z = z + np.uint64(salt * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF)
        z = z * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        u = ((z >> np.uint64(11)).astype(np.float64) * 2.0**-53) * 2 - 1
    return torch.from_numpy(u.astype(np.float32).reshape(tuple(shape)))


def weight(name: str, shape: Sequence[int], salt: int) -> Tensor:
    """The golden value of the state-dict entry `name` (the spelling of the class named in the spec's source)."""
    u = uniform(name, shape, salt)
    last = name.rsplit(".", 1)[-1]
    if last == "modulation":
        return 0.5 * u
    if last in ("bias", "beta"):
        return 0.1 * u
    if last in ("gamma", "scale") or (last == "weight" and len(shape) == 1):
        return 1 + 0.2 * u
    if last in ("class_embedding", "pos_embedding", "cls_embedding", "emb_pos"):
        return 0.2 * u
    return u * math.sqrt(3 / math.prod(shape[1:])) if len(shape) else u


def input_tensor(name: str, shape: Sequence[int], salt: int, scale: float = 1.7) -> Tensor:
    return uniform("input." + name, shape, salt) * scale


def fill(module: nn.Module, salt: int, prefix: str = "") -> None:
    """Fill every floating parameter of `module`, whose state dict must carry the official key names."""
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(weight(prefix + name, tensor.shape, salt))


def assert_golden(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Largest absolute difference under `tolerance` of the golden's largest absolute value."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    worst = (got.double() - want.double()).abs().max().item() / want.double().abs().max().item()
    assert worst < tolerance, f"off by {worst:.2e} of the largest value, allowed {tolerance:.0e}"
