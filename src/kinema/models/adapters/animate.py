"""Animate: a skeleton added to the grid, and a face that every fifth block attends to.

Source: Wan-Video/Wan2.2 wan/modules/animate/model_animate.py, face_blocks.py (Apache-2.0).
Parity: tests/parity/test_animate.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.adapters.adapter import Adapter
from kinema.models.adapters.motion import FaceEncoder, MotionEncoder
from kinema.models.layers import LayerNorm, Linear, RMSNorm, map_once
from kinema.models.wan_blocks import Context, KVCache, Stream
from kinema.models.wan_config import PATCH, WanConfig
from kinema.tensors import AnimateConditions

if TYPE_CHECKING:
    from kinema.models.wan import WanDiT


class FuserBlock(nn.Module):
    """Each latent frame's tokens attend to the few face tokens of that frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.linear1_kv = Linear(config.dim, 2 * config.dim)
        self.linear1_q = Linear(config.dim, config.dim)
        self.linear2 = Linear(config.dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.eps)
        self.k_norm = RMSNorm(config.head_dim, config.eps)

    def project(self, faces_BFSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B F, N, S, K] of the face tokens."""
        rows = self.linear1_kv(self.norm(faces_BFSD)).flatten(0, 1).unflatten(-1, (2, -1, self.head_dim))
        k_BSNK, v_BSNK = rows.unbind(2)
        return self.k_norm(k_BSNK).transpose(1, 2), v_BSNK.transpose(1, 2)

    def forward(self, tokens_BLD: Tensor, faces: KVCache, frames: int) -> Tensor:
        """Return what to add to the tokens, float32."""
        q = self.q_norm(self.linear1_q(self.norm(tokens_BLD)).unflatten(-1, (-1, self.head_dim)))
        q_BNLK = q.unflatten(1, (frames, -1)).flatten(0, 1).transpose(1, 2)
        y_BNLK = F.scaled_dot_product_attention(q_BNLK, *faces.of(self, self.project))
        y_BLD: Tensor = self.linear2(y_BNLK.transpose(1, 2).flatten(2).reshape(tokens_BLD.shape))
        return y_BLD.float()


@dataclass(frozen=True)
class AnimateState:
    """pose_BLD: rows for the tokens behind the reference frame's. faces: face tokens [B, F, S, D]."""

    pose_BLD: Tensor
    faces: KVCache


class Animate(Adapter):
    field = "animate"

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        animate = config.animate
        assert animate is not None
        self.interval = animate.interval
        self.pose_patch_embedding = nn.Conv3d(animate.pose_channels, config.dim, kernel_size=PATCH, stride=PATCH)
        self.motion_encoder = MotionEncoder(animate)
        self.face_encoder = FaceEncoder(animate, config.dim)
        blocks = (FuserBlock(config) for _ in range(config.num_layers // animate.interval))
        self.face_adapter = nn.ModuleDict({"fuser_blocks": nn.ModuleList(blocks)})

    def prepare(self, model: WanDiT, told: Sequence[AnimateConditions]) -> list[AnimateState]:
        poses = map_once(self._pose, [given.pose_BCFhw for given in told])
        faces = map_once(lambda given: KVCache(self.face_tokens(given)), told)
        return list(map(AnimateState, poses, faces))

    def _pose(self, pose_BCFhw: Tensor) -> Tensor:
        pose: Tensor = self.pose_patch_embedding(pose_BCFhw.to(self.pose_patch_embedding.weight.dtype))
        return pose.flatten(2).transpose(1, 2).float()

    def face_tokens(self, given: AnimateConditions) -> Tensor:
        """Return face tokens [B, F, S, D]: zeros for the reference's latent frame, then those of the video's."""
        latent_frames = given.pose_BCFhw.shape[2]
        motion_BTC = self.motion_encoder(given.face_BCTHW)
        if motion_BTC.shape[1] == 1:  # one face for all frames, as in the unconditional branch
            motion_BTC = motion_BTC.expand(-1, 4 * latent_frames - 3, -1)
        tokens = self.face_encoder(motion_BTC)
        if tokens.shape[1] != latent_frames:
            raise ValueError(f"faces of {tokens.shape[1]} latent frames, a pose of {latent_frames}")
        return torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)

    def embed(self, model: WanDiT, stream: Stream, state: AnimateState) -> Stream:
        per_frame = stream.grid[1] * stream.grid[2]
        reference, video = stream.tokens_BLD[:, :per_frame], stream.tokens_BLD[:, per_frame:]
        if state.pose_BLD.shape[1] != video.shape[1]:
            raise ValueError(
                f"the pose has {state.pose_BLD.shape[1]} tokens, the latents behind the first frame {video.shape[1]}"
            )
        return replace(stream, tokens_BLD=torch.cat([reference, video + state.pose_BLD], dim=1))

    def after_block(self, index: int, stream: Stream, context: Context, state: AnimateState) -> Stream:
        block = self._after(index)
        if block is None:
            return stream
        face_BLD = block(stream.tokens_BLD, state.faces, stream.grid[0])
        return replace(stream, tokens_BLD=stream.tokens_BLD + face_BLD)

    def companions(self, index: int) -> Iterable[nn.Module]:
        block = self._after(index)
        return [] if block is None else [block]

    def _after(self, index: int) -> FuserBlock | None:
        place = index // self.interval
        return self.blocks[place] if index % self.interval == 0 and place < len(self.blocks) else None

    @property
    def blocks(self) -> list[FuserBlock]:
        return list(cast(Iterable[FuserBlock], self.face_adapter["fuser_blocks"]))
