"""Structure of a Wan DiT and of what may be added to it: all that its constructor needs. No modules here.

Field names say what is there, never what task it is for. See `WanConfig` for where values come from.
"""

from __future__ import annotations

from dataclasses import dataclass

PATCH = (1, 2, 2)
"""Latent frames, rows and columns of one token."""


@dataclass(frozen=True)
class VaceConfig:
    """Side blocks whose outputs are added after main blocks.

    layers        the main block that each side block follows; the first is 0.
    in_channels   of its context: inactive latents, reactive latents, mask.
    """

    layers: tuple[int, ...]
    in_channels: int = 96


@dataclass(frozen=True)
class CameraConfig:
    """An adapter that adds a camera's path to the grid.

    in_channels   of its input at pixel size: four frames of six Pluecker coordinates.
    downscale     pixels that become one latent cell, each way.
    """

    in_channels: int = 24
    downscale: int = 8


@dataclass(frozen=True)
class ReferenceConfig:
    """A convolution that turns the latents of a reference image into tokens in front of the video's."""

    in_channels: int


@dataclass(frozen=True)
class AnimateConfig:
    """A skeleton added to the grid, and a face encoder whose tokens every few blocks attend to.

    channels       of the motion encoder, one after each halving of the face; the last of 4 x 4 pixels.
    motion_width   of a motion vector.
    motion_dim     amplitudes a motion vector is made of.
    face_width     of one head of the face encoder; face_heads: how many, each a token a latent frame.
    interval       a face block after main blocks 0, interval, 2 * interval, ...
    pose_channels  of the skeleton's latents.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    motion_width: int = 512
    motion_dim: int = 20
    face_width: int = 1024
    face_heads: int = 4
    interval: int = 5
    pose_channels: int = 16

    @property
    def face_size(self) -> int:
        """Side of a face crop in pixels."""
        return 4 * 2 ** (len(self.channels) - 1)


@dataclass(frozen=True)
class SpeechConfig:
    """Sound, a reference image, motion and a pose video: what S2V adds.

    layers          main blocks after which the video attends to the sound.
    audio_dim       width of the speech encoder, of which `audio_layers` hidden states are read.
    num_tokens      local tokens of sound a latent frame, besides a constant one.
    pose_channels   latent channels of the pose video.
    """

    layers: tuple[int, ...]
    audio_dim: int = 1024
    audio_layers: int = 25
    num_tokens: int = 4
    pose_channels: int = 16


ADAPTER_CONFIGS: dict[str, type] = {
    "vace": VaceConfig,
    "camera": CameraConfig,
    "reference": ReferenceConfig,
    "animate": AnimateConfig,
    "speech": SpeechConfig,
}
"""Fields of WanConfig that hold structures of their own; fields of Conditions of the same name feed them."""


@dataclass(frozen=True)
class WanConfig:
    """Structure of one Wan DiT; every field can be read from tensor shapes except `text_len` and `eps`.

    in_channels          noise channels plus those of `Conditions.concat_BCFhw`.
    has_clip_tokens      cross-attention has its own keys and values for CLIP tokens (2.1 image models).
    num_clip_positions   rows of the learned position of CLIP tokens: 514 for first-last frame, else 0.
    vace, camera, ...    structure of each adapter, None where the model has none.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    in_channels: int
    out_channels: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    has_clip_tokens: bool = False
    clip_dim: int = 1280
    num_clip_positions: int = 0
    head_dim: int = 128
    eps: float = 1e-6
    vace: VaceConfig | None = None
    camera: CameraConfig | None = None
    reference: ReferenceConfig | None = None
    animate: AnimateConfig | None = None
    speech: SpeechConfig | None = None

    @property
    def num_heads(self) -> int:
        return self.dim // self.head_dim
