"""The causal autoencoder run over a whole clip at once, for training: no caches, and large convolutions.

Works on the modules of a WanVAE 2.1 (names as in the checkpoint). A 4-dimensional input is a batch of single
frames: with no history every causal convolution is its last temporal tap, a 2D convolution.
`tests/e2e/test_demo_model.py` holds that both forms agree with WanVAE.encode and decode.
Source: Wan-Video/Wan2.2 wan/modules/vae2_1.py (Apache-2.0), for the rule of the first frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _causal(conv: nn.Module, x: Tensor) -> Tensor:
    """A causal convolution: two frames of zeros before the first."""
    if x.dim() == 4:
        return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=conv.weight.shape[3] // 2)
    if conv.weight.shape[2] == 1:
        return _taps(conv, [x])
    x = F.pad(x, (0, 0, 0, 0, 2, 0))
    return _taps(conv, [x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]])


def _taps(conv: nn.Module, taps: list[Tensor]) -> Tensor:
    """A 3D convolution as a 2D one over its temporal taps laid side by side as channels.

    Twice as fast as conv3d in bfloat16 on a CPU, whose gradient moreover came out as NaN with torch 2.13.
    """
    frames, weight = taps[0].shape[2], conv.weight
    side_by_side = (
        torch.cat([tap.permute(0, 2, 3, 4, 1) for tap in taps], dim=-1)
        if len(taps) > 1
        else taps[0].permute(0, 2, 3, 4, 1)
    )
    stacked = side_by_side.flatten(0, 1).permute(0, 3, 1, 2)
    y = F.conv2d(stacked, weight.transpose(1, 2).flatten(1, 2), conv.bias, padding=weight.shape[3] // 2)
    return y.permute(0, 2, 3, 1).unflatten(0, (-1, frames)).permute(0, 4, 1, 2, 3)


def _rms(x: Tensor, gamma: Tensor) -> Tensor:
    wide = x.float()
    return (wide * (torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + 1e-12) * gamma)).to(x.dtype)


def _rms_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return F.silu(_rms(x, gamma).float()).to(x.dtype)


def fuse() -> None:
    """Compile the norm with its activation: on a CPU these cost more than the convolutions."""
    global _rms_silu
    torch._dynamo.config.recompile_limit = 64  # one compilation for each shape of each level
    _rms_silu = torch.compile(_rms_silu, dynamic=False)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return _rms(x, norm.gamma.view(1, -1, *(1,) * (x.dim() - 2)))


def _norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    return _rms_silu(x, norm.gamma.view(1, -1, *(1,) * (x.dim() - 2)))


def _residual(block: nn.Module, x: Tensor) -> Tensor:
    r = block.residual
    y = _causal(r[2], _norm_silu(r[0], x))
    y = _causal(r[6], _norm_silu(r[3], y))
    return y + (x if isinstance(block.shortcut, nn.Identity) else _causal(block.shortcut, x))


def _per_frame(function, x: Tensor) -> Tensor:
    if x.dim() == 4:
        return function(x)
    frames = x.transpose(1, 2).flatten(0, 1)
    return function(frames).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


def _attention(block: nn.Module, x: Tensor) -> Tensor:
    def attend(frame_BChw: Tensor) -> Tensor:
        qkv = F.conv2d(_norm(block.norm, frame_BChw), block.to_qkv.weight, block.to_qkv.bias)
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frame_BChw.shape)
        return F.conv2d(y, block.proj.weight, block.proj.bias)

    return x + _per_frame(attend, x)


def _down(block: nn.Module, x: Tensor) -> Tensor:
    conv = block.resample[1]
    x = _per_frame(lambda frame: F.conv2d(F.pad(frame, (0, 1, 0, 1)), conv.weight, conv.bias, stride=2), x)
    if x.dim() == 5 and block.time_conv is not None:
        later = _taps(block.time_conv, [x[:, :, :-2:2], x[:, :, 1::2], x[:, :, 2::2]])
        x = torch.cat([x[:, :, :1], later], dim=2)
    return x


def _up(block: nn.Module, x: Tensor) -> Tensor:
    if x.dim() == 5 and block.time_conv is not None:
        pairs = _causal(block.time_conv, x[:, :, 1:]).unflatten(1, (2, -1))  # B 2 C F h w
        x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
    conv = block.resample[1]
    return _per_frame(lambda f: F.conv2d(F.interpolate(f, scale_factor=2.0), conv.weight, conv.bias, padding=1), x)


def _run(blocks: nn.Module, x: Tensor, resample) -> Tensor:
    for block in blocks:
        if hasattr(block, "residual"):
            x = _residual(block, x)
        elif hasattr(block, "resample"):
            x = resample(block, x)
        else:
            x = _attention(block, x)
    return x


def encode(vae: nn.Module, video: Tensor) -> Tensor:
    """Unnormalised latent mean of a video [B, 3, T, H, W] or of frames [B, 3, H, W] in [-1, 1]."""
    e = vae.encoder
    x = _run(e.middle, _run(e.downsamples, _causal(e.conv1, video), _down), _down)
    return _causal(vae.conv1, _causal(e.head[2], _norm_silu(e.head[0], x))).chunk(2, dim=1)[0]


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Video (or frames) of unnormalised latents, not clamped."""
    d = vae.decoder
    x = _run(d.upsamples, _run(d.middle, _causal(d.conv1, _causal(vae.conv2, latents)), _up), _up)
    return _causal(d.head[2], _norm_silu(d.head[0], x))


def initialise(vae: nn.Module) -> None:
    """Start as an image model that is a linear autoencoder plus small corrections.

    With the usual initialisation (gains of a third, because only the last temporal tap is used, and biases larger
    than the signal) training sits at the mean colour, 15 dB, for thousands of steps.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Conv3d) or name.endswith("time_conv"):
            continue
        with torch.no_grad():
            weight = module.weight[:, :, -1] if module.weight.dim() == 5 else module.weight
            start = torch.empty(weight.shape)
            if "residual" in name or "head" in name:
                nn.init.kaiming_normal_(start, nonlinearity="relu")
            else:
                nn.init.orthogonal_(start.flatten(1))
            if name.endswith(("residual.6", "proj")):
                start *= 0.1
            weight.copy_(start)
            module.bias.zero_()


def grow_temporal(vae: nn.Module) -> None:
    """Make an image model into a clip model that begins by doing the same: history ignored, frames repeated."""
    for name, module in vae.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Conv3d) or weight is None or weight.shape[2] != 3:
            continue
        with torch.no_grad():
            if not name.endswith("time_conv"):
                weight[:, :, :-1].zero_()
                continue
            out_channels, channels = weight.shape[:2]
            nn.init.normal_(weight, std=0.3 / (3 * channels) ** 0.5)
            module.bias.zero_()
            for offset in range(0, out_channels, channels):
                weight[offset : offset + channels, :, -1, 0, 0] += torch.eye(channels, device=weight.device)
