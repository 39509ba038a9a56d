"""SigLIP's image tower and FLUX.1 Redux's embedder: an image as rows beside those of the text.

Parameter names are those of the published files, SigLIP's without `vision_model.`. Knows nothing of checkpoints.

Source: huggingface/transformers SiglipVisionModel; black-forest-labs/flux src/flux/modules/image_embedders.py
(Apache-2.0). Parity: tests/parity/test_flux_encoders.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.clip_layers import Layer, Tower
from kinema.models.layers import LayerNorm, Linear

HEAD_DIM = 72


@dataclass(frozen=True)
class SiglipConfig:
    """Structure of a SigLIP image tower; so400m-patch14-384 is (384, 14, 1152, 4304, 27)."""

    image_size: int
    patch_size: int
    dim: int
    mlp_dim: int
    num_layers: int
    eps: float = 1e-6


class Embeddings(nn.Module):
    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.dim, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding((config.image_size // config.patch_size) ** 2, config.dim)


class Siglip(nn.Module):
    """Image tower with its final norm, without the pooling head."""

    def __init__(self, config: SiglipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        dim, heads, gelu = config.dim, config.dim // HEAD_DIM, nn.GELU(approximate="tanh")
        self.encoder = Tower(
            Layer(dim, config.mlp_dim, heads, eps=config.eps, activation=gelu) for _ in range(config.num_layers)
        )
        self.post_layernorm = LayerNorm(config.dim, config.eps)

    @torch.no_grad()
    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Return rows_BVD, float32, of RGB pixels in [-1, 1] of any size: the image is squashed to a square."""
        size = (self.config.image_size, self.config.image_size)
        pixels = F.interpolate(pixels_BCHW.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        weight = self.embeddings.patch_embedding.weight
        patches: Tensor = self.embeddings.patch_embedding(pixels.to(weight.device, weight.dtype))
        x_BVD = patches.flatten(2).transpose(1, 2).float() + self.embeddings.position_embedding.weight.float()
        rows_BVD: Tensor = self.post_layernorm(self.encoder(x_BVD))
        return rows_BVD


@dataclass(frozen=True)
class ReduxConfig:
    """Widths of the Redux embedder; the published one is (1152, 12288, 4096)."""

    image_dim: int
    hidden_dim: int
    text_dim: int


class Redux(nn.Module):
    """SigLIP rows to rows of the text's width."""

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__()
        self.config = config
        self.redux_up = Linear(config.image_dim, config.hidden_dim)
        self.redux_down = Linear(config.hidden_dim, config.text_dim)

    def forward(self, rows_BVD: Tensor) -> Tensor:
        y: Tensor = self.redux_down(F.silu(self.redux_up(rows_BVD)))
        return y.float()
