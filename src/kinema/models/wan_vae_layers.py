"""Layers of the causal Wan VAE, both versions, and the memory that lets them see a clip chunk by chunk.

Every activation is [B, C, T, H, W], best in torch.channels_last_3d: folding frames into the batch is then a view.
The first chunk of a clip is always one frame; later chunks hold any number of frames the strides divide.
No layer keeps a tensor between calls: what it must remember goes into the History that is passed down.

Source: Wan-Video/Wan2.2 wan/modules/vae2_1.py, vae2_2.py (Apache-2.0): key names, shapes, formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class History(dict[nn.Module, Tensor]):
    """The last frames each temporal layer saw of one clip (and one tile of it); empty at the start of a clip.

    last     set before a clip's last chunk: nothing is remembered any more, which spares its memory
             (for a still image, all of it).
    on_host  keep it in host memory.
    """

    last = False
    on_host = False

    def exchange(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor | None:
        """Return what `layer` remembered (None at the start of a clip) and remember the last `frames` frames of x.

        Where x is shorter, frames remembered before fill up; before the start of a clip there are zeros.
        """
        past = self.pop(layer, None)
        if past is not None:
            past = past.to(x.device)
        if not self.last:
            missing = frames - x.shape[2]
            if missing <= 0:
                # A view would keep the whole chunk alive.
                self[layer] = x[:, :, -frames:].clone()
            elif past is None:
                self[layer] = F.pad(x, (0, 0, 0, 0, missing, 0))
            else:
                self[layer] = torch.cat([past[:, :, -missing:], x], dim=2)
            if self.on_host:
                self[layer] = self[layer].to("cpu")
        return past

    def park(self) -> None:
        """Move everything remembered to host memory; `exchange` brings it back."""
        for layer, frames in self.items():
            self[layer] = frames.to("cpu")

    def bytes(self) -> int:
        return sum(frames.untyped_storage().nbytes() for frames in self.values())


class CausalConv3d(nn.Conv3d):
    """Convolution over (3, k, k) whose output frame t sees the input frames t-2, t-1 and t."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, (3, kernel, kernel), padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        past = history.exchange(self, x, frames=2)
        if past is None:
            # The first frame: two of the three temporal taps would meet zeros only.
            assert x.shape[2] == 1, "the first chunk of a clip is one frame"
            return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.padding[1:]).unsqueeze(2)
        return super().forward(torch.cat([past, x], dim=2))


class ChannelNorm(nn.Module):
    """Scale each position's channel vector to length sqrt(C), times gamma. `axes` is how many axes follow C."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *(1,) * axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gamma * math.sqrt(self.gamma.shape[0]))


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        # The checkpoint's numbering counts the activations and, at 5, a dropout.
        self.residual = nn.Sequential(
            ChannelNorm(in_dim),
            nn.SiLU(inplace=True),
            CausalConv3d(in_dim, out_dim),
            ChannelNorm(out_dim),
            nn.SiLU(inplace=True),
            nn.Identity(),
            CausalConv3d(out_dim, out_dim),
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, history: History) -> Tensor:
        return self.shortcut(x) + run(self.residual, x, history)


class AttentionBlock(nn.Module):
    """Single-head attention among the positions of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return x + per_frame(self._attend, x)

    def _attend(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        qkv = self.to_qkv(self.norm(x)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return self.proj(out.transpose(1, 2).unflatten(2, (h, w)))


class Downsample(nn.Module):
    """Halve height and width, and with `temporal` the frames too; a clip's first frame stays alone."""

    def __init__(self, dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = history.exchange(self.time_conv, x, frames=1)
        return x if past is None else self.time_conv(torch.cat([past, x], dim=2))


class Upsample(nn.Module):
    """Double height and width, and with `temporal` the frames too; a clip's first frame stays one."""

    def __init__(self, dim: int, out_dim: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, out_dim, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, kernel=1) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        if self.time_conv is not None:
            if self.time_conv in history:
                x = interleave_frames(self.time_conv(x, history))
            else:
                # Trained so: the frames after the first never see it here, but zeros in its place.
                history.exchange(self.time_conv, torch.zeros_like(x), frames=2)
        return per_frame(self.resample, x)


class DownLevel(nn.Module):
    """A level of the 2.2 encoder: its blocks, plus a shortcut without weights that averages what they shrink."""

    def __init__(self, layers: list[nn.Module], out_dim: int, frames: int, space: int) -> None:
        super().__init__()
        self.downsamples = nn.ModuleList(layers)
        self.out_dim, self.frames, self.space = out_dim, frames, space

    def forward(self, x: Tensor, history: History) -> Tensor:
        shortcut = average_down(x, self.out_dim, self.frames, self.space)
        for layer in self.downsamples:
            x = layer(x, history)
        return x + shortcut


class UpLevel(nn.Module):
    """A level of the 2.2 decoder: its blocks, plus, where it enlarges, a shortcut without weights that repeats."""

    def __init__(self, layers: list[nn.Module], out_dim: int, frames: int, space: int) -> None:
        super().__init__()
        self.upsamples = nn.ModuleList(layers)
        self.out_dim, self.frames, self.space = out_dim, frames, space

    def forward(self, x: Tensor, history: History) -> Tensor:
        entered = x
        for layer in self.upsamples:
            x = layer(x, history)
        if self.space == 1:
            return x
        shortcut = repeat_up(entered, self.out_dim, self.frames, self.space)
        # A clip's first frame stays one: its repetitions in front are dropped.
        return x + shortcut[:, :, -x.shape[2] :]


def average_down(x_BCTHW: Tensor, out_dim: int, frames: int, space: int) -> Tensor:
    """Move blocks of frames x space x space positions into the channels, then average neighbouring channels.

    A lone first frame gets zero frames in front.
    """
    x = F.pad(x_BCTHW, (0, 0, 0, 0, -x_BCTHW.shape[2] % frames, 0))
    B, C, T, H, W = x.shape
    blocks = x.reshape(B, C, T // frames, frames, H // space, space, W // space, space)
    blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7)
    return blocks.reshape(*blocks.shape[:4], out_dim, -1).mean(dim=-1).permute(0, 4, 1, 2, 3)


def repeat_up(x_BCTHW: Tensor, out_dim: int, frames: int, space: int) -> Tensor:
    """Repeat channels, then spread them over blocks of frames x space x space positions."""
    B, C, T, H, W = x_BCTHW.shape
    repeats = out_dim * frames * space * space // C
    spread = x_BCTHW.permute(0, 2, 3, 4, 1).unsqueeze(-1).expand(B, T, H, W, C, repeats)
    spread = spread.reshape(B, T, H, W, out_dim, frames, space, space).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return spread.reshape(B, T * frames, H * space, W * space, out_dim).permute(0, 4, 1, 2, 3)


def patchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C * patch * patch, T, H / patch, W / patch]; channels ordered (C, column, row)."""
    x = x_BCTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Undo `patchify`."""
    x = x_BCTHW.unflatten(1, (-1, patch, patch))
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def run(layers: nn.Sequential, x: Tensor, history: History) -> Tensor:
    """Run layers in order, handing the history to those that take one."""
    for layer in layers:
        x = layer(x, history) if isinstance(layer, CausalConv3d) else layer(x)
    return x


def per_frame(function: Callable[[Tensor], Tensor], x_BCTHW: Tensor) -> Tensor:
    """Apply an image function to every frame, with the frames in the batch."""
    batch = x_BCTHW.shape[0]
    y = function(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def interleave_frames(x_BCTHW: Tensor) -> Tensor:
    """[B, 2C, T, H, W] -> [B, C, 2T, H, W]: the first half of the channels is frame 2t, the second 2t + 1."""
    x_B2CTHW = x_BCTHW.unflatten(1, (2, -1))
    # Through channels-last order, so that the layout survives.
    x_BT2HWC = x_B2CTHW.permute(0, 3, 1, 4, 5, 2)
    return x_BT2HWC.flatten(1, 2).permute(0, 4, 1, 2, 3)
