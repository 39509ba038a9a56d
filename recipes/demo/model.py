"""The text encoder and the DiT of the demo model as one module: what train_dit.py trains and the others load."""

from __future__ import annotations

from torch import Tensor, nn
from train_text import TEXT
from train_vae import RUNS

from kinema.models.encoders import UMT5
from kinema.models.wan import WanConfig, WanDiT, stays_float32
from kinema.tensors import Conditions

DIT = WanConfig(dim=256, ffn_dim=512, num_layers=7, in_channels=36, out_channels=16, text_dim=TEXT.dim, text_len=64)
CHECKPOINT = RUNS / "dit.pt"


class Model(nn.Module):
    """The DiT, which is trained, behind the text encoder, which is not."""

    def __init__(self) -> None:
        super().__init__()
        self.text = UMT5(TEXT).requires_grad_(False)
        self.dit = WanDiT(DIT)
        self.dit.init_weights()

    def forward(self, x_BCFhw: Tensor, timesteps_B: Tensor, ids_BS: Tensor, concat_BCFhw: Tensor) -> Tensor:
        """Velocity of noisy latents."""
        mask_BS = ids_BS != 0
        rows_BSD = self.text.encode(ids_BS, mask_BS) * mask_BS[..., None]
        context = self.dit.prepare(Conditions(text=tuple(rows_BSD), concat_BCFhw=concat_BCFhw))
        velocity: Tensor = self.dit(x_BCFhw, timesteps_B, context)
        return velocity

    def fast_weights(self) -> dict[str, Tensor]:
        """The weights as they are used: matrices of the blocks in bfloat16, as in kinema's fast precision.

        Autocast would do the same with three times the casts, and upcast the norms.
        """
        return {
            name: p if name.startswith("text.") or stays_float32(name.removeprefix("dit.")) else p.bfloat16()
            for name, p in self.named_parameters()
        }
