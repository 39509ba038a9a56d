"""Small and full-size checkpoint files for tests: real layouts, written sparse or filled with golden weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from golden_weights import fill
from kinema.schema import Component
from kinema.weights.structure import MODELS, constructor_arguments

MANIFESTS = Path(__file__).parent / "formats" / "manifests"
BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1, "I8": 1}

TINY: dict[Component, dict[str, Any]] = {
    "dit": {
        "dim": 128,
        "ffn_dim": 96,
        "num_layers": 2,
        "in_channels": 36,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 64,
        "has_clip_tokens": True,
        "clip_dim": 48,
        "num_clip_positions": 20,
    },
    "vae": {
        "version": "2.1",
        "dim": 8,
        "dec_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temporal_downsample": [False, True, True],
    },
    "text_encoder": {
        "vocab": 60,
        "dim": 32,
        "dim_attn": 24,
        "num_heads": 4,
        "ffn_dim": 40,
        "num_layers": 2,
        "num_buckets": 32,
    },
    "clip_vision": {
        "image_size": 28,
        "patch_size": 14,
        "dim": 160,
        "num_heads": 2,
        "num_layers": 3,
        "mlp_ratio": 2,
    },
    "audio_encoder": {
        "dim": 128,
        "num_layers": 2,
        "ffn_dim": 64,
        "conv_dim": 16,
        "kernels": [10, 3, 3, 3, 3, 2, 2],
        "position_kernel": 16,
        "position_width": 32,
    },
    "motion_controller": {"freq_dim": 32, "dim": 128},
}
"""Constructor arguments of one small model of each component, all of them readable from shapes."""

TINY_VAE22 = {**TINY["vae"], "version": "2.2", "dim": 8, "dec_dim": 12, "z_dim": 48}


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a full-size model."""
    table = json.loads((MANIFESTS / f"{name}.json").read_text())["tensors"]
    return {key: tuple(shape) for key, shape in table.items()}


def write_sparse(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: str = "BF16", metadata: dict[str, str] | None = None
) -> Path:
    """Write a safetensors file of full size whose numbers are a hole: zeros that take no disk."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


def tiny(component: Component, config: dict[str, Any] | None = None, salt: int = 3) -> nn.Module:
    """Return a small model of golden weights."""
    module = MODELS[component].module(MODELS[component].arguments(**constructor_arguments(config or TINY[component])))
    fill(module, salt)
    return module.requires_grad_(False).eval()


def official_state(component: Component, config: dict[str, Any] | None = None, salt: int = 3) -> dict[str, Tensor]:
    """Return the tensors of a small model as its official file spells them, those that are never used included."""
    state = {name: tensor.contiguous() for name, tensor in tiny(component, config, salt).state_dict().items()}
    if component == "clip_vision":
        last = (config or TINY[component])["num_layers"] - 1
        state |= {
            name.replace("transformer.0.", f"transformer.{last}."): tensor.clone()
            for name, tensor in state.items()
            if name.startswith("transformer.0.")
        }
        state |= {
            "post_norm.weight": state["pre_norm.weight"].clone(),
            "post_norm.bias": state["pre_norm.bias"].clone(),
        }
        state = {f"visual.{name}": tensor for name, tensor in state.items()}
    return state


def write(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path, metadata=metadata)
    return path
