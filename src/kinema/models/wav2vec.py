"""wav2vec 2.0: sound to features, every hidden state of it, for the speech-driven model.

Written out here rather than wrapped: S2V reads all the hidden states, and how transformers collects them has changed
between versions. transformers is the oracle in the tests. Parameter names are those of its files without the prefix
`wav2vec2.`. Everything runs in float32. Knows nothing of files, frames per second of a file, or of the DiT.

Source: arXiv:2006.11477; huggingface/transformers Wav2Vec2Model (Apache-2.0); Wan-Video/Wan2.2
wan/modules/s2v/audio_encoder.py (Apache-2.0). Parity: tests/parity/test_wav2vec.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.clip_layers import Attention
from kinema.models.layers import LayerNorm, Linear

SAMPLE_RATE = 16_000
"""Samples a second that the model hears."""

STRIDES = (5, 2, 2, 2, 2, 2, 2)
HOP = math.prod(STRIDES)
"""Samples from one feature to the next: 20 ms."""

FEATURE_RATE, INDEX_RATE = 50, 30
"""Features a second; and the rate they are brought to before video frames pick theirs, as officially."""

WINDOW_SECONDS, CONTEXT_SECONDS = 600, 20
"""Sound up to WINDOW_SECONDS is heard whole. Longer sound in windows of that, which overlap by twice the context."""

PIECE_FEATURES = 1500
"""Features of which the convolutions make at once; their windows overlap exactly, so this changes no number."""

Stop = Callable[[], None]


@dataclass(frozen=True)
class Wav2VecConfig:
    """Structure of a wav2vec 2.0 with layer norms in its convolutions and before its attention ("stable" form).

    conv_dim, kernels   width and kernel of each convolution; their strides are STRIDES.
    position_kernel     taps of the convolution that gives positions, in groups of `position_width` channels.
    """

    dim: int
    num_layers: int
    ffn_dim: int
    conv_dim: int = 512
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    position_kernel: int = 128
    position_width: int = 64
    head_dim: int = 64
    eps: float = 1e-5

    @property
    def receptive_field(self) -> int:
        """Samples that one feature is made of: 400."""
        field = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(STRIDES), strict=True):
            field = (field - 1) * stride + kernel
        return field


class ConvLayer(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel, stride)
        self.layer_norm = LayerNorm(out_dim, eps)

    def forward(self, x_BCT: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x_BCT).transpose(1, 2))).transpose(1, 2)


class FeatureExtractor(nn.Module):
    """Samples [B, N] to features [B, T, conv_dim]; each sees `receptive_field` samples, HOP apart."""

    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        dims = (1, *(config.conv_dim for _ in config.kernels))
        self.conv_layers = nn.ModuleList(
            ConvLayer(dims[i], dims[i + 1], kernel, STRIDES[i], config.eps) for i, kernel in enumerate(config.kernels)
        )

    def forward(self, samples_BN: Tensor) -> Tensor:
        x_BCT = samples_BN[:, None]
        for layer in self.conv_layers:
            x_BCT = layer(x_BCT)
        return x_BCT.transpose(1, 2)


class FeatureProjection(nn.Module):
    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(config.conv_dim, config.eps)
        self.projection = Linear(config.conv_dim, config.dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTD: Tensor = self.projection(self.layer_norm(x_BTC))
        return y_BTD


class PositionConv(nn.Module):
    """A grouped convolution whose kernel is stored as direction `weight_v` and, tap by tap, length `weight_g`."""

    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        kernel, width = config.position_kernel, config.position_width
        self.groups = config.dim // width
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel))
        self.weight_v = nn.Parameter(torch.empty(config.dim, width, kernel).normal_())
        self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        kernel = weight.shape[2]
        y_BDT = F.conv1d(x_BTD.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups)
        return F.gelu(y_BDT[:, :, : x_BTD.shape[1]]).transpose(1, 2)  # an even kernel makes one feature too many


class AudioFeedForward(nn.Module):
    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        self.intermediate_dense = Linear(config.dim, config.ffn_dim)
        self.output_dense = Linear(config.ffn_dim, config.dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.output_dense(F.gelu(self.intermediate_dense(x_BTD)))
        return y_BTD


class AudioLayer(nn.Module):
    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(config.dim, config.eps)
        self.attention = Attention(config.dim, config.dim // config.head_dim)
        self.final_layer_norm = LayerNorm(config.dim, config.eps)
        self.feed_forward = AudioFeedForward(config)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.layer_norm(x_BTD))
        return x_BTD + self.feed_forward(self.final_layer_norm(x_BTD))


class AudioTransformer(nn.Module):
    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        self.pos_conv_embed = nn.ModuleDict({"conv": PositionConv(config)})
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.num_layers))
        self.layer_norm = LayerNorm(config.dim, config.eps)


class Wav2Vec(nn.Module):
    """wav2vec 2.0 without its speech-recognition head."""

    def __init__(self, config: Wav2VecConfig) -> None:
        super().__init__()
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.feature_projection = FeatureProjection(config)
        self.encoder = AudioTransformer(config)

    @property
    def num_states(self) -> int:
        return self.config.num_layers + 1

    def convolve(self, samples_N: Tensor) -> Tensor:
        """Return features_TC of normalised samples, in pieces that overlap by what one feature sees: exact."""
        config, weight = self.config, self.feature_projection.projection.weight
        total = num_features(len(samples_N), config)
        pieces = []
        for start in range(0, total, PIECE_FEATURES):
            stop = min(start + PIECE_FEATURES, total)
            piece_N = samples_N[start * HOP : (stop - 1) * HOP + config.receptive_field]
            pieces.append(self.feature_extractor(piece_N[None].to(weight.device))[0])
        return torch.cat(pieces)

    def hidden_states(self, features_TC: Tensor) -> Iterator[Tensor]:
        """Yield states_TD, num_layers + 1 of them: the input of each layer, then the normed output of the last."""
        x_BTD: Tensor = self.feature_projection(features_TC[None])
        x_BTD = x_BTD + self.encoder.pos_conv_embed["conv"](x_BTD)
        for layer in self.encoder.layers:
            yield x_BTD[0]
            x_BTD = layer(x_BTD)
        yield self.encoder.layer_norm(x_BTD)[0]

    def forward(self, samples_N: Tensor) -> Tensor:
        """Return all hidden states_LTD of samples at SAMPLE_RATE, zero mean and unit variance."""
        return torch.stack(list(self.hidden_states(self.convolve(samples_N))))


def num_features(samples: int, config: Wav2VecConfig) -> int:
    """Return how many features so many samples make."""
    return max(0, (samples - config.receptive_field) // HOP + 1)


@torch.inference_mode()
def encode_audio(
    model: Wav2Vec, waveform_N: Tensor, frames: int, fps: float = 16, *, stop: Stop = lambda: None
) -> Tensor:
    """Return features_LDT, float32 on the CPU: all hidden states of the sound that each of `frames` video frames hears.

    waveform_N  mono at SAMPLE_RATE, float32.
    stop        called between layers; may raise.

    The 50 features a second are interpolated linearly to 30, and frame k takes number round(30 k / fps); frames after
    the sound hear zeros. Sound up to WINDOW_SECONDS is heard in one pass, as officially, its convolutions in pieces
    that change nothing; longer sound in windows, each with CONTEXT_SECONDS of its neighbours.
    Peak memory: hidden states of one window, and the result.
    """
    waveform_N = waveform_N.float()
    centred_N = waveform_N - waveform_N.mean()
    # The variance of the official feature extractor, population and with its epsilon.
    normal_N = centred_N / torch.sqrt(centred_N.square().mean() + 1e-7)
    total = num_features(len(normal_N), model.config)
    rows, lower, share = feature_places(total, frames, fps)
    result_LDT = torch.zeros(model.num_states, model.config.dim, frames)
    for begin, end in _windows(total):
        inside = (lower >= begin) & (lower < end)
        if not bool(inside.any()):
            continue
        first, last = max(0, begin - CONTEXT_SECONDS * FEATURE_RATE), min(total, end + CONTEXT_SECONDS * FEATURE_RATE)
        heard_N = normal_N[first * HOP : (last - 1) * HOP + model.config.receptive_field]
        low, weight = lower[inside] - first, share[inside][:, None]
        high = (low + 1).clamp(max=last - first - 1)
        for layer, state_TD in enumerate(model.hidden_states(model.convolve(heard_N))):
            stop()
            state_TD = state_TD.float().cpu()
            result_LDT[layer, :, rows[inside]] = torch.lerp(state_TD[low], state_TD[high], weight).T
    return result_LDT


def feature_places(total: int, frames: int, fps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows, lower, share): frame `rows[i]` hears (1 - share) of feature `lower` and share of the next one.

    Frames past the sound are left out.
    Source: Wan-Video/Wan2.2 wan/modules/s2v/audio_encoder.py (Apache-2.0): linear interpolation with aligned corners to
    floor(total / 50 * 30) features, then the index numpy rounds to.
    """
    count = int(total / float(FEATURE_RATE) * INDEX_RATE)
    places = [round(k / fps * INDEX_RATE) for k in range(frames)]  # halves to even, as numpy
    rows = [k for k, place in enumerate(places) if place < count]
    step = (total - 1) / (count - 1) if count > 1 else 0.0
    exact = [places[k] * step for k in rows]
    lower = [min(int(place), total - 1) for place in exact]
    share = [place - low for place, low in zip(exact, lower, strict=True)]
    return torch.tensor(rows, dtype=torch.long), torch.tensor(lower, dtype=torch.long), torch.tensor(share)


def _windows(total: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of the features each pass is responsible for."""
    size = WINDOW_SECONDS * FEATURE_RATE
    if total <= size:
        yield 0, total
        return
    core = size - 2 * CONTEXT_SECONDS * FEATURE_RATE
    for begin in range(0, total, core):
        yield begin, min(begin + core, total)
