"""The transformer layer that CLIP's text tower and SigLIP's image tower share, under transformers' names; wav2vec 2.0
shares its attention.

Runs in the dtype of its weights with a float32 residual stream.
Source: openai/CLIP clip/model.py (MIT); huggingface/transformers CLIPEncoderLayer, SiglipEncoderLayer (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import LayerNorm, Linear

Activation = Callable[[Tensor], Tensor]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, causal: bool = False) -> None:
        super().__init__()
        self.num_heads, self.causal = num_heads, causal
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        q, k, v = (
            part(x_BLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BNLK = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y_BLD: Tensor = self.out_proj(y_BNLK.transpose(1, 2).flatten(2))
        return y_BLD


class MLP(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = Linear(dim, mlp_dim)
        self.fc2 = Linear(mlp_dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD: Tensor = self.fc2(self.activation(self.fc1(x_BLD)))
        return y_BLD


class Layer(nn.Module):
    """Attention and MLP, each behind a norm and beside a skip."""

    def __init__(
        self, dim: int, mlp_dim: int, num_heads: int, *, eps: float, activation: Activation, causal: bool = False
    ) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(dim, eps)
        self.self_attn = Attention(dim, num_heads, causal)
        self.layer_norm2 = LayerNorm(dim, eps)
        self.mlp = MLP(dim, mlp_dim, activation)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.layer_norm1(x_BLD))
        x_BLD = x_BLD + self.mlp(self.layer_norm2(x_BLD))
        return x_BLD


class Tower(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: Iterable[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x_BLD: Tensor) -> Tensor:
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return x_BLD
