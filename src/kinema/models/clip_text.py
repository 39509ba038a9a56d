"""CLIP's text tower (CLIP-L): one pooled vector of a prompt, for FLUX.1.

Parameter names are those of the transformers files without `text_model.`. Knows nothing of checkpoints.

Source: openai/CLIP clip/model.py (MIT); huggingface/transformers CLIPTextModel (Apache-2.0).
Parity: tests/parity/test_flux_encoders.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kinema.models.clip_layers import Layer, Tower, quick_gelu
from kinema.models.layers import LayerNorm

HEAD_DIM = 64


@dataclass(frozen=True)
class ClipTextConfig:
    """Structure of a CLIP text tower; CLIP-L is (49408, 77, 768, 3072, 12)."""

    vocab: int
    num_positions: int
    dim: int
    mlp_dim: int
    num_layers: int
    eps: float = 1e-5


class Embeddings(nn.Module):
    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.position_embedding = nn.Embedding(config.num_positions, config.dim)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSD: Tensor = self.token_embedding(ids_BS).float()
        return x_BSD + self.position_embedding.weight[: ids_BS.shape[1]].float()


class ClipText(nn.Module):
    """Token ids to one vector: the last layer's row of the first end token, after the final norm."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        dim, heads = config.dim, config.dim // HEAD_DIM
        self.encoder = Tower(
            Layer(dim, config.mlp_dim, heads, eps=config.eps, activation=quick_gelu, causal=True)
            for _ in range(config.num_layers)
        )
        self.final_layer_norm = LayerNorm(config.dim, config.eps)

    @torch.no_grad()
    def encode(self, ids: tuple[int, ...]) -> Tensor:
        """Return pooled_1D, float32, of one prompt's ids, the start token first and the end token last.

        Attention is causal: padding behind the end token would change nothing, and is left out.
        """
        x_BSD = self.embeddings(torch.tensor([ids], device=self.embeddings.token_embedding.weight.device))
        pooled_BD: Tensor = self.final_layer_norm(self.encoder(x_BSD)[:, ids.index(ids[-1])])
        return pooled_BD
