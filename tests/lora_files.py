"""LoRA files for tests, written as their publishers write them, and the one formula each algorithm must follow.

Spellings are literal here: nothing of the tables under test is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import write
from golden_weights import uniform

RANK, ALPHA = 4, 2.0
LINEARS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.v",
           "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


def random(name: str, *shape: int, scale: float = 0.3) -> Tensor:
    return uniform("lora." + name, shape, 5) * scale


@dataclass(frozen=True)
class Written:
    """A LoRA as tensors by official module, without dialect; `scale` is alpha / rank."""

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    scale: float = ALPHA / RANK

    def deltas(self) -> dict[str, Tensor]:
        """The reference: W' = W + alpha / rank * up @ down."""
        return {f"{name}.weight": self.scale * self.up[name] @ self.down[name] for name in self.down}


def low_rank(shapes: Mapping[str, tuple[int, ...]], layers: int = 2, scale: float = ALPHA / RANK) -> Written:
    """Return matrices for every Linear of the blocks of a model of these parameter shapes."""
    modules = [f"blocks.{i}.{name}" for i in range(layers) for name in LINEARS]
    modules = [name for name in modules if f"{name}.weight" in shapes]
    return Written(
        {name: random(name + ".a", RANK, shapes[f"{name}.weight"][1]) for name in modules},
        {name: random(name + ".b", shapes[f"{name}.weight"][0], RANK) for name in modules},
        scale,
    )


def _plain(prefix: str, down: str, up: str, alpha: bool) -> Callable[[Written], dict[str, Tensor]]:
    def spell(lora: Written) -> dict[str, Tensor]:
        state = {}
        for name in lora.down:
            gain = 1.0 if alpha else lora.scale
            state[f"{prefix}{name}{down}"] = lora.down[name]
            state[f"{prefix}{name}{up}"] = lora.up[name] * gain
            if alpha:
                state[f"{prefix}{name}.alpha"] = torch.tensor(lora.scale * RANK)
        return state

    return spell


def _joined(prefix: str) -> Callable[[Written], dict[str, Tensor]]:
    def spell(lora: Written) -> dict[str, Tensor]:
        state = {}
        for name in lora.down:
            key = prefix + name.replace(".", "_")
            state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"] = lora.down[name], lora.up[name]
            state[f"{key}.alpha"] = torch.tensor(lora.scale * RANK)
        return state

    return spell


def _diffusers(lora: Written) -> dict[str, Tensor]:
    state = {}
    for name in lora.down:
        _, layer, inner = name.split(".", 2)
        key = f"transformer.blocks.{layer}.{DIFFUSERS[inner]}"
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = lora.down[name], lora.up[name] * lora.scale
    return state


AB, DU = (".lora_A.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_up.weight")
SPELLINGS: dict[str, Callable[[Written], dict[str, Tensor]]] = {
    "official": _plain("", *AB, alpha=False),
    "diffsynth": _plain("", ".lora_A.default.weight", ".lora_B.default.weight", alpha=False),
    "diffsynth with its pipeline": _plain("pipe.dit.", ".lora_A.default.weight", ".lora_B.default.weight", alpha=False),
    "comfyui": _plain("diffusion_model.", *AB, alpha=False),
    "comfyui with alpha": _plain("diffusion_model.", *AB, alpha=True),
    "lightx2v": _plain("diffusion_model.", *DU, alpha=True),
    "kohya": _joined("lora_unet_"),
    "videox-fun": _joined("lora_unet__"),
    "peft": _plain("base_model.model.", *AB, alpha=False),
    "peft of an adapter": _plain("base_model.model.", ".lora_A.mine.weight", ".lora_B.mine.weight", alpha=False),
    "diffusers": _diffusers,
    "transformer. with official names": _plain("transformer.", *AB, alpha=False),
    "mochi": _plain("diffusion_model.", ".lora_A", ".lora_B", alpha=False),
    "old diffusers": _plain("", ".lora.down.weight", ".lora.up.weight", alpha=False),
    "older diffusers": _plain("", "_lora.down.weight", "_lora.up.weight", alpha=False),
    "bare with alpha": _plain("", *DU, alpha=True),
}
"""Every spelling of the same matrices; those without alpha carry it in `up`."""


def write_lora(path: Path, spelling: str, lora: Written, metadata: dict[str, str] | None = None) -> Path:
    state = {name: tensor.clone().contiguous() for name, tensor in SPELLINGS[spelling](lora).items()}
    return write(path, state, metadata)


# --- the other algorithms: tensors of one module, and the weight they must make --------------------


def loha(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    a1, b1, a2, b2 = (random(f"{name}.{i}", *shape, scale=0.7)
                      for i, shape in enumerate([(out, RANK), (RANK, into)] * 2))  # fmt: skip
    state = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return state, lambda weight: weight + ALPHA / RANK * (a1 @ b1) * (a2 @ b2)


def lokr(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """A small whole factor and a large one of low rank, as LyCORIS writes it with factor 4."""
    w1 = random(f"{name}.1", 4, 4)
    a, b = random(f"{name}.2a", out // 4, RANK), random(f"{name}.2b", RANK, into // 4)
    delta = torch.zeros(out, into)
    for i in range(4):
        for j in range(4):
            delta[i * out // 4 : (i + 1) * out // 4, j * into // 4 : (j + 1) * into // 4] = w1[i, j] * (a @ b)
    state = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return state, lambda weight: weight + ALPHA / RANK * delta


def lokr_whole(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Both factors whole: alpha then means nothing."""
    w1, w2 = random(f"{name}.1", 2, 4), random(f"{name}.2", out // 2, into // 4)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, lambda weight: weight + torch.kron(w1, w2)


def dora(name: str, out: int, into: int, by_row: bool = True) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    down, up = random(f"{name}.a", RANK, into), random(f"{name}.b", out, RANK)
    magnitude = 1 + random(f"{name}.m", *((out, 1) if by_row else (1, into)))

    def apply(weight: Tensor) -> Tensor:
        turned = weight + ALPHA / RANK * up @ down
        return magnitude * turned / turned.square().sum(1 if by_row else 0, keepdim=True).sqrt()

    state = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA), "dora_scale": magnitude}
    return state, apply


def dora_by_column(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    return dora(name, out, into, by_row=False)


def dora_of_peft(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """PEFT keeps the magnitude as a vector over the rows, and no alpha."""
    state, _ = dora(name, out, into)
    down, up, magnitude = state["lora_down.weight"], state["lora_up.weight"], state["dora_scale"]

    def apply(weight: Tensor) -> Tensor:
        turned = weight + up @ down
        return magnitude * turned / turned.norm(dim=1, keepdim=True)

    return {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude.flatten()}, apply


def difference(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    full = random(name, out, into)
    return {"diff": full}, lambda weight: weight + full


def whole(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    full = random(name, out, into)
    return {"set_weight": full}, lambda weight: full


BLOCK = 16


def oft(name: str, out: int, into: int, alpha: float = 0.0) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """Diagonal OFT as LyCORIS has it: rows in blocks of 16, turned by (1 + Q) (1 - Q)^-1, transposed; lengths after."""
    blocks, rescale = random(f"{name}.o", out // BLOCK, BLOCK, BLOCK), 1 + random(f"{name}.r", out, 1)
    skew, eye = blocks - blocks.transpose(1, 2), torch.eye(BLOCK)
    if alpha and skew.norm() > alpha * out:
        skew = skew * alpha * out / skew.norm()
    turns = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q) for q in skew))
    state = {"oft_blocks": blocks, "rescale": rescale, "alpha": torch.tensor(alpha)}
    return state, lambda weight: rescale * (turns.T @ weight)


def oft_limited(name: str, out: int, into: int) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    state, apply = oft(name, out, into, alpha=0.01)
    return {key: tensor for key, tensor in state.items() if key != "rescale"}, lambda w: apply(w) / state["rescale"]


ALGORITHMS = {
    "loha": loha,
    "lokr": lokr,
    "lokr whole": lokr_whole,
    "dora": dora,
    "dora by column": dora_by_column,
    "dora of peft": dora_of_peft,
    "difference": difference,
    "whole weight": whole,
    "oft": oft,
    "oft limited": oft_limited,
}
assert math.isclose(ALPHA / RANK, 0.5)
