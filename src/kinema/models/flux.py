"""The FLUX.1 transformer: one class for dev, schnell, Krea, Fill, Kontext, Canny and Depth.

Parameter names are those of the published files. Speaks the same language as the Wan DiT: latents with a frame axis
(one frame), timesteps in [0, 1000], `prepare` for what is constant, swappable `attention` and `run_blocks`.
Knows nothing of files, devices, schedules or guidance branches.

Source of the architecture: black-forest-labs/flux src/flux/model.py, modules/layers.py (Apache-2.0).
Parity: tests/parity/test_flux.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.models.layers import Attention, LayerNorm, Linear, RunBlocks, rotate, run_in_order, sdpa, sinusoid
from kinema.tensors import Conditions

PATCH = 2
"""Latent rows and columns of one token."""

AXES = (16, 56, 56)
"""How the numbers of a head are shared by the three axes of a position: image index, row, column."""

HEAD_DIM = sum(AXES)

FREQUENCIES = 256
EPS = 1e-6
FLOAT32_PARTS = ("img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")
"""Prefixes of the keys that stay float32 whatever the compute dtype; see also `stays_float32`."""


def stays_float32(key: str) -> bool:
    """Whether the parameter `key` stays float32 in fast mode: all but the matrices of blocks and the text input."""
    return key.startswith(FLOAT32_PARTS) or key.endswith("norm.scale")


@dataclass(frozen=True)
class FluxConfig:
    """Structure of one FLUX.1 transformer; every field can be read from tensor shapes.

    in_channels   latent channels with those of `Conditions.concat_BCFhw`: 16; 32 Canny and Depth; 96 Fill.
    has_guidance  the guidance scale is an input (all but schnell).
    """

    dim: int = 3072
    mlp_dim: int = 12288
    num_double: int = 19
    num_single: int = 38
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    vector_dim: int = 768
    has_guidance: bool = True

    def __post_init__(self) -> None:
        if self.dim % HEAD_DIM:
            raise ValueError(f"width {self.dim} does not divide into heads {HEAD_DIM} wide")


@dataclass(frozen=True)
class FluxContext:
    """What stays constant over the steps of one request and guidance branch. Made by `FluxDiT.prepare`.

    text_BSD        embedded text rows.
    vector_BD       embedded pooled text, with that of the guidance scale.
    concat_BCFhw    channels put after the noise.
    images          packed tokens [B, L, 4C] of images to attend to (Kontext), and their (rows, columns).
    """

    text_BSD: Tensor
    vector_BD: Tensor
    concat_BCFhw: Tensor | None = None
    images: tuple[tuple[Tensor, tuple[int, int]], ...] = ()


@dataclass(frozen=True)
class FluxStream:
    """What flows through the blocks of one forward pass.

    text_BSD, tokens_BLD  residual streams, float32. The first single block joins them in `tokens_BLD`, text first;
                          `text_BSD` is None from there on.
    vector_BD             what modulates every block: timestep, guidance and pooled text.
    rope_LK               unit complex numbers, one row a token, text first.
    front                 tokens of text.
    grid                  rows and columns of the image's tokens.
    attention             the attention core of this pass.
    """

    text_BSD: Tensor | None
    tokens_BLD: Tensor
    vector_BD: Tensor
    rope_LK: Tensor
    front: int
    grid: tuple[int, int]
    attention: Attention


# --- layers ----------------------------------------------------------------------------------------


class HeadNorm(nn.Module):
    """RMS norm over one head, its weight named `scale`. Rounds to the input's dtype before the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEAD_DIM))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=EPS) * self.scale.to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.key_norm = HeadNorm(), HeadNorm()

    def forward(self, qkv_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split a fused projection into q, k, v [B, L, N, K]; q and k normalised."""
        q_BLNK, k_BLNK, v_BLNK = qkv_BLD.unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)
        return self.query_norm(q_BLNK), self.key_norm(k_BLNK), v_BLNK


class TwoLayers(nn.Module):
    """Linear, SiLU, Linear: embeds timestep, guidance and pooled text."""

    def __init__(self, in_features: int, dim: int) -> None:
        super().__init__()
        self.in_layer = Linear(in_features, dim)
        self.out_layer = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_layer(F.silu(self.in_layer(x)))
        return y.float()


class Modulation(nn.Module):
    """Rows [B, 1, D] of shift, scale and gate, `parts` of them, from the vector."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = Linear(dim, parts * dim)

    def forward(self, vector_BD: Tensor) -> tuple[Tensor, ...]:
        rows_BD: Tensor = self.lin(F.silu(vector_BD)).float()
        return rows_BD[:, None].chunk(self.parts, dim=-1)


class FluxAttention(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.norm = QKNorm()
        self.proj = Linear(config.dim, config.dim)


def attend(q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor, stream: FluxStream) -> Tensor:
    """Return joint attention of all tokens, heads side by side [B, L, D]."""
    q_BLNK, k_BLNK = rotate(q_BLNK, stream.rope_LK), rotate(k_BLNK, stream.rope_LK)
    y_BNLK = stream.attention(q_BLNK.transpose(1, 2), k_BLNK.transpose(1, 2), v_BLNK.transpose(1, 2))
    return y_BNLK.transpose(1, 2).flatten(2)


def _shifted(norm: nn.Module, x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    return torch.addcmul(shift_B1D, norm(x_BLD), 1 + scale_B1D)


class DoubleBlock(nn.Module):
    """Text and image in two streams with weights of their own, joined in attention."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(config.dim, 6), Modulation(config.dim, 6)
        self.img_attn, self.txt_attn = FluxAttention(config), FluxAttention(config)
        self.img_mlp, self.txt_mlp = _mlp(config), _mlp(config)
        self.norm = LayerNorm(config.dim, EPS, elementwise_affine=False)

    def forward(self, stream: FluxStream) -> FluxStream:
        image, text = stream.tokens_BLD, stream.text_BSD
        assert text is not None, "a double block after a single one"
        image_mod, text_mod = self.img_mod(stream.vector_BD), self.txt_mod(stream.vector_BD)
        both = [
            part.norm(part.qkv(_shifted(self.norm, x_BLD, shift, scale)))
            for part, x_BLD, (shift, scale, *_) in (
                (self.txt_attn, text, text_mod),
                (self.img_attn, image, image_mod),
            )
        ]
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*both, strict=True))
        y_BLD = attend(q, k, v, stream)
        y_text, y_image = y_BLD.split([text.shape[1], image.shape[1]], dim=1)
        return replace(
            stream,
            tokens_BLD=self._finish(image, self.img_attn.proj(y_image), image_mod, self.img_mlp),
            text_BSD=self._finish(text, self.txt_attn.proj(y_text), text_mod, self.txt_mlp),
        )

    def _finish(self, x_BLD: Tensor, y_BLD: Tensor, rows: Sequence[Tensor], mlp: nn.Module) -> Tensor:
        _, _, gate_attn, shift_mlp, scale_mlp, gate_mlp = rows
        x_BLD = torch.addcmul(x_BLD, y_BLD.float(), gate_attn)
        y_BLD = mlp(_shifted(self.norm, x_BLD, shift_mlp, scale_mlp))
        return torch.addcmul(x_BLD, y_BLD.float(), gate_mlp)


def _mlp(config: FluxConfig) -> nn.Sequential:
    return nn.Sequential(
        Linear(config.dim, config.mlp_dim), nn.GELU(approximate="tanh"), Linear(config.mlp_dim, config.dim)
    )


class SingleBlock(nn.Module):
    """Text and image in one stream; attention and MLP side by side, fused at both ends."""

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.split = (3 * config.dim, config.mlp_dim)
        self.modulation = Modulation(config.dim, 3)
        self.linear1 = Linear(config.dim, sum(self.split))
        self.norm = QKNorm()
        self.linear2 = Linear(config.dim + config.mlp_dim, config.dim)
        self.pre_norm = LayerNorm(config.dim, EPS, elementwise_affine=False)

    def forward(self, stream: FluxStream) -> FluxStream:
        x_BLD = stream.tokens_BLD
        if stream.text_BSD is not None:
            x_BLD = torch.cat([stream.text_BSD, x_BLD], dim=1)
        shift, scale, gate = self.modulation(stream.vector_BD)
        qkv_BLD, hidden_BLD = self.linear1(_shifted(self.pre_norm, x_BLD, shift, scale)).split(self.split, dim=-1)
        q, k, v = self.norm(qkv_BLD)
        y_BLD = attend(q, k, v, stream)
        y_BLD = self.linear2(torch.cat([y_BLD, F.gelu(hidden_BLD, approximate="tanh")], dim=-1))
        return replace(stream, tokens_BLD=torch.addcmul(x_BLD, y_BLD.float(), gate), text_BSD=None)


class FinalLayer(nn.Module):
    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.dim, EPS, elementwise_affine=False)
        self.linear = Linear(config.dim, config.out_channels * PATCH * PATCH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(config.dim, 2 * config.dim))

    def forward(self, x_BLD: Tensor, vector_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vector_BD).float()[:, None].chunk(2, dim=-1)
        y_BLD: Tensor = self.linear(_shifted(self.norm_final, x_BLD, shift, scale))
        return y_BLD.float()


# --- positions and patches ---------------------------------------------------------------------------


def pack(x_BCFhw: Tensor) -> Tensor:
    """Return tokens [B, h/2 * w/2, 4C] of single-frame latents: columns ordered (channel, row, column)."""
    patches = x_BCFhw.squeeze(2).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens_BLD: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return latents [B, C, 1, h, w] of `grid` tokens: the inverse of `pack`."""
    patches = tokens_BLD.unflatten(1, grid).unflatten(3, (-1, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, :, None]


def image_positions(index: int, grid: tuple[int, int], top: int = 0) -> Tensor:
    """Return positions [L, 3] of an image's tokens: (index, top + row, column)."""
    rows, columns = grid
    return torch.stack(
        torch.meshgrid(
            torch.tensor([float(index)]), torch.arange(rows) + float(top), torch.arange(columns).float(), indexing="ij"
        ),
        dim=-1,
    ).flatten(0, 2)


def rotations(positions_L3: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return unit complex numbers [L, K/2] that turn by each position, angles computed in float64 on the CPU."""
    parts = []
    for axis, width in enumerate(AXES):
        frequencies = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        parts.append(torch.outer(positions_L3[:, axis].double(), frequencies))
    angles = torch.cat(parts, dim=1)
    return torch.polar(torch.ones_like(angles), angles).to(dtype).to(device)


# --- the model ---------------------------------------------------------------------------------------


class FluxDiT(nn.Module):
    """Velocity of FLUX latents under text, and optionally concatenated channels or further images.

    attention    attention core, read at every forward: see `layers.Attention`.
    run_blocks   has the weights of each block at hand while it is used: see `layers.RunBlocks`.
    """

    attention: Attention
    run_blocks: RunBlocks

    def __init__(self, config: FluxConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = sdpa
        self.run_blocks = run_in_order
        self.img_in = Linear(config.in_channels * PATCH * PATCH, config.dim)
        self.time_in = TwoLayers(FREQUENCIES, config.dim)
        self.vector_in = TwoLayers(config.vector_dim, config.dim)
        if config.has_guidance:
            self.guidance_in = TwoLayers(FREQUENCIES, config.dim)
        self.txt_in = Linear(config.text_dim, config.dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single))
        self.final_layer = FinalLayer(config)

    def prepare(self, conditions: Conditions) -> FluxContext:
        """Return the constant context: embedded text rows, and one vector of pooled text and guidance scale.

        Text rows are padded to one length by the encoder, and all of them are attended. Raises ValueError for pooled
        text that is missing, or a guidance scale given or missing wrongly.
        """
        flux = conditions.flux
        if flux is None:
            raise ValueError("this transformer needs pooled text (Conditions.flux)")
        if self.config.has_guidance != (flux.guidance is not None):
            raise ValueError(f"this transformer {'needs a' if self.config.has_guidance else 'takes no'} guidance scale")
        vector_BD = self.vector_in(flux.pooled_BD)
        if flux.guidance is not None:
            scale = torch.tensor([1000.0 * flux.guidance], device=vector_BD.device)
            vector_BD = vector_BD + self.guidance_in(sinusoid(scale, FREQUENCIES))
        text_BSD: Tensor = self.txt_in(torch.stack(conditions.text))
        images = tuple((pack(x), (x.shape[3] // PATCH, x.shape[4] // PATCH)) for x in flux.images)
        return FluxContext(text_BSD.float(), vector_BD, conditions.concat_BCFhw, images)

    def prepare_branches(self, branches: Sequence[Conditions]) -> list[FluxContext]:
        """Return what `prepare` returns of each guidance branch."""
        return [self.prepare(conditions) for conditions in branches]

    def embed(self, x_BCFhw: Tensor, timesteps_B: Tensor, context: FluxContext) -> FluxStream:
        """Return latents as tokens, images to attend to behind them, with positions and the modulating vector."""
        if context.concat_BCFhw is not None:
            x_BCFhw = torch.cat([x_BCFhw, context.concat_BCFhw.to(x_BCFhw).expand(len(x_BCFhw), -1, -1, -1, -1)], dim=1)
        _, channels, frames, height, width = x_BCFhw.shape
        if channels != self.config.in_channels or frames != 1 or height % PATCH or width % PATCH:
            wanted = f"one frame of {self.config.in_channels} channels and even height and width"
            raise ValueError(f"latents {list(x_BCFhw.shape)}, conditions included, are not {wanted}")
        grid = (height // PATCH, width // PATCH)
        tokens, positions = [pack(x_BCFhw)], [torch.zeros(context.text_BSD.shape[1], 3), image_positions(0, grid)]
        top = 0
        for image_BLD, image_grid in context.images:
            tokens.append(image_BLD.to(x_BCFhw))
            positions.append(image_positions(1, image_grid, top))
            top += image_grid[0]
        exact = self.img_in.weight.dtype == self.txt_in.weight.dtype == torch.float32 and x_BCFhw.device.type != "mps"
        return FluxStream(
            text_BSD=context.text_BSD,
            tokens_BLD=self.img_in(torch.cat(tokens, dim=1)).float(),
            vector_BD=self.time_in(sinusoid(timesteps_B, FREQUENCIES)) + context.vector_BD,
            rope_LK=rotations(
                torch.cat(positions), torch.complex128 if exact else torch.complex64, device=x_BCFhw.device
            ),
            front=context.text_BSD.shape[1],
            grid=grid,
            attention=self.attention,
        )

    def forward(self, x_BCFhw: Tensor, timesteps_B: Tensor, *contexts: FluxContext) -> Tensor:
        """Return velocity_BCFhw, float32: noise minus clean latents; of several contexts one after the other, in B.

        x_BCFhw       noisy latents of one frame.
        timesteps_B   in [0, 1000].
        contexts      of several guidance branches, all of which pass a block before the next one's turn.
        """

        def step(block: nn.Module, index: int, streams: list[FluxStream]) -> list[FluxStream]:
            for branch in range(len(streams)):
                # In place, so that no branch's tokens of before live on beside the next branch's.
                streams[branch] = block(streams[branch])
            return streams

        streams = [self.embed(x_BCFhw, timesteps_B, context) for context in contexts]
        return torch.cat([self.unembed(stream) for stream in self.run_blocks(self.blocks, step, streams)])

    def unembed(self, stream: FluxStream) -> Tensor:
        """Return the velocity_BCFhw, float32, of the image's tokens: those between the text's and further images'."""
        rows, columns = stream.grid
        tokens_BLD = stream.tokens_BLD[:, stream.front : stream.front + rows * columns]
        return unpack(self.final_layer(tokens_BLD, stream.vector_BD), stream.grid)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order they run."""
        return [*self.double_blocks, *self.single_blocks]

    def block_groups(self) -> list[list[nn.Module]]:
        """Return each block with the modules that run with it: none."""
        return [[block] for block in self.blocks]
