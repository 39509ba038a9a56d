"""Bytes that tensors between layers take, at the fullest moment of each model: what memory planning adds to weights.

Pure arithmetic that follows the layers; tests/unit/test_activations.py tracks the tensors those really make, at
published sizes. What a library adds inside one operation is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

Config = Mapping[str, Any]

HEAD_DIM = 128
SMALLEST_TILE = 8
"""Latent cells an edge, as in models.wan_vae_tiles."""
FACES_AT_ONCE = 8
"""As in models.adapters.motion."""


# --- the DiT ---------------------------------------------------------------------------------------


def tokens_beside(config: Config, rows: int, columns: int, *, motion: bool) -> int:
    """Return how many tokens adapters put before or behind the video's, for latents of so many rows and columns.

    motion   whether S2V is shown the frames before the clip, packed: see models.adapters.speech.FramePacker.
    """
    frame = (rows // 2) * (columns // 2)
    if not config.get("speech"):
        return frame if config.get("reference") else 0
    return frame + motion * (frame + (rows // 4) * (columns // 4) + 4 * (rows // 8) * (columns // 8))


def dit_bytes(
    config: Config, tokens: int, text_rows: int, dtype_bytes: int, *, branches: int = 1, ffn_tokens: int | None = None,
    timesteps: int = 1,
) -> float:  # fmt: skip
    """Return bytes of one forward: the tokens of every branch that passes a block together, and one block's work.

    tokens      all of them, those of adapters included.
    text_rows   rows that keys and values are kept of, for all blocks; give the sum over branches.
    timesteps   different ones that tokens see: where there are several, rows are modulated in parts and joined.
    """
    d, ffn, h = config["dim"], config["ffn_dim"], dtype_bytes
    real = 4 if h == 2 else 8  # what a rotation computes in
    rotation = 4 * h * d + 2 * real * d  # input, queries, keys, turned keys; keys as real pairs, and those turned
    residual = (12 + h + 4 * (timesteps > 1)) * d  # tokens before and after, what is added, and that in float32
    part = min(1.0, (ffn_tokens or tokens) / tokens)
    hidden = part * 2 * ffn * h
    joined = (h if part == 1 else 2 * h) * d
    feed_forward = 4 * d + h * d + max(hidden + (joined - h * d), joined)
    rope = 8 * HEAD_DIM if h == 4 else 4 * HEAD_DIM
    side = 4 * d + (4 * d if config.get("vace") else 0)
    hinted = (4 + h) * d if config.get("vace") else 0  # a side block runs before its main block has let go
    constant = 2 * text_rows * config["num_layers"] * d * h
    return float(tokens * (branches * (side + rope) + max(rotation, residual, feed_forward) + hinted) + constant)


def adapter_bytes(config: Config, tokens: int, dtype_bytes: int) -> float:
    """Return bytes of what adapters make once for all guidance branches and keep over the steps: rows of tokens."""
    kept = {"vace": 4, "camera": dtype_bytes, "animate": 4, "speech": 4}
    return float(tokens * config["dim"] * sum(size for name, size in kept.items() if config.get(name)))


def face_bytes(animate: Config, frames: int) -> float:
    """Return bytes of a clip's faces on their way through Animate's motion encoder, eight at once in float32."""
    channels = animate["channels"]
    face = 4 ** (len(channels) + 1)  # pixels; the last of the channels is of 4 x 4
    widest = max(width * face / 4**level for level, width in enumerate(channels))
    return float(4 * (3 * frames * face + min(frames, FACES_AT_ONCE) * (4 * widest)))


def ffn_pieces(config: Config, dtype_bytes: int) -> int:
    """Return into how many pieces a feed-forward has to go for its hidden rows to be no more than attention takes."""
    d, h = config["dim"], dtype_bytes
    spare = (2 * (4 if h == 2 else 8) - 4 + h) * d
    return int(-(-2 * config["ffn_dim"] * h // spare))


# --- encoders --------------------------------------------------------------------------------------


def text_bytes(config: Config, rows: int) -> float:
    """Return bytes of one prompt of so many rows through umT5, whose activations are float32."""
    d, wide, heads = config["dim"], config["dim_attn"], config["num_heads"]
    attention = 4 * rows * (2 * d + 4 * wide) + 4 * heads * rows * rows * 3
    return float(max(attention, 4 * rows * (2 * d + 3 * config["ffn_dim"])))


def clip_bytes(config: Config) -> float:
    tokens = (config["image_size"] // config["patch_size"]) ** 2 + 1
    return float(4 * tokens * config["dim"] * (4 + 2 * config.get("mlp_ratio", 4)))


def hearing_bytes(config: Config, seconds: float) -> float:
    """Return bytes of sound through wav2vec2: ten minutes of it at once at most, its convolutions in pieces of 30 s."""
    pieces = 3 * 4 * min(seconds, 30) * 3200 * config.get("conv_dim", 512)
    layers = 4 * min(seconds, 600) * 50 * (6 * config["dim"] + 2 * config["ffn_dim"])
    return float(max(pieces, layers))


# --- the autoencoder -------------------------------------------------------------------------------


def vae_bytes(
    config: Config, height: int, width: int, dtype_bytes: int, *, decoder: bool, chunk: int = 1,
    tile: int | None = None, history_elsewhere: bool = False, still: bool = False,
) -> float:  # fmt: skip
    """Return bytes of a clip on its way through the decoder or the encoder, `chunk` latent frames at a time.

    height, width       of the latents.
    tile                edge in latent cells of the tiles they are cut into.
    history_elsewhere   what the causal convolutions remember lies in host memory, the layer at work excepted.
    still               it is one frame, of which nothing has to be remembered.
    """
    rows, columns = (tile_cells(side, tile) for side in (height, width))
    levels = _Levels(config, chunk, decoder, still)
    fullest = max(levels.moments())
    remembered = 0 if history_elsewhere or (rows, columns) != (height, width) else levels.history
    picture = 4 * height * width * (1 if still else chunk * levels.stride) * 3 * levels.scale**2
    # Beside the fullest layer the pictures of the piece before, or this one's; at the border copies to patch, clamp and
    # reorder them.
    inside, border = fullest * rows * columns * dtype_bytes + 2 * picture, (4 if decoder else 3) * picture
    return float(rows * columns * dtype_bytes * remembered + max(inside, border))


def vae_history_bytes(config: Config, height: int, width: int, dtype_bytes: int, *, decoder: bool) -> float:
    """Return bytes that the causal convolutions remember of a whole frame, between chunks."""
    return float(height * width * dtype_bytes * _Levels(config, 1, decoder).history)


def tile_cells(length: int, tile: int | None) -> int:
    """Return the edge in cells of the tiles that cover `length`: as models.wan_vae_tiles.spans makes them."""
    if tile is None or tile >= length:
        return length
    overlap = tile // 4
    count = -(-(length - overlap) // (tile - overlap))
    return -(-(length + (count - 1) * overlap) // count)


class _Levels:
    """The tensors of a Wan VAE layer by layer, in values for each latent cell.

    history   what temporal layers remember: two frames of their input each, one where frames are halved.
    stride    pixel frames, and `scale` pixels along an edge, of a latent cell.
    """

    def __init__(self, config: Config, chunk: int, decoder: bool, still: bool = False) -> None:
        self.config, self.decoder, self.still = config, decoder, still
        self.old = config["version"] == "2.1"
        self.patch = 1 if self.old else 2
        self.mult = tuple(config["dim_mult"])
        temporal = tuple(config["temporal_downsample"])
        self.stride = 2 ** sum(temporal)
        self.scale = self.patch * 2 ** (len(self.mult) - 1)
        self.history = 0.0
        base = (config.get("dec_dim") or config["dim"]) if decoder else config["dim"]
        self.dims = [base * m for m in ((self.mult[-1], *reversed(self.mult)) if decoder else (1, *self.mult))]
        self.temporal = (*reversed(temporal), False) if decoder else (*temporal, False)
        self.temporal = tuple(halves and not still for halves in self.temporal)
        self.frames = 1.0 if still else float(chunk if decoder else chunk * self.stride)
        self.area = 1.0 if decoder else 4.0 ** (len(self.mult) - 1)
        for _ in self.moments():
            pass

    def moments(self) -> Iterator[float]:
        """Yield what is alive, layer by layer, without what is remembered."""
        self.history = 0.0
        frames, area = self.frames, self.area
        z, edge = self.config["z_dim"], 3 * self.patch**2
        yield self._conv(z if self.decoder else edge, self.dims[0], frames, area, 0)
        if self.decoder:
            yield from self._blocks(self.dims[0], self.dims[0], 2, frames, area, 0, 0)
        count = self.config["num_res_blocks"] + self.decoder
        for level, (in_dim, out_dim) in enumerate(pairwise(self.dims)):
            resized, temporal = level < len(self.mult) - 1, self.temporal[level]
            in_dim = in_dim // 2 if self.decoder and self.old and level else in_dim
            entered = in_dim * frames * area
            shortcut = out_dim * frames * area / ((4 if resized else 1) * (2 if temporal else 1))
            # Of 2.2, what enters a level lives on until its end, and the encoder's shortcut is made first.
            held = 0.0 if self.old else entered if self.decoder else entered + shortcut
            if not self.old and not self.decoder:
                yield 3 * entered
            yield from self._blocks(in_dim, out_dim, count, frames, area, held, 0.0 if self.old else entered)
            if resized:
                yield from (self._up if self.decoder else self._down)(out_dim, frames, area, temporal, held)
                grown = 2.0 if self.decoder else 0.5
                frames, area = frames * (grown if temporal else 1), area * grown**2
                if not self.old and self.decoder:
                    yield held + 3 * out_dim * frames * area
        if not self.decoder:
            yield from self._blocks(self.dims[-1], self.dims[-1], 2, frames, area, 0, 0)
        last = edge if self.decoder else 2 * z
        yield self._conv(self.dims[-1], last, frames, area, self.dims[-1] * frames * area)

    def _blocks(
        self, in_dim: int, out_dim: int, count: int, frames: float, area: float, held: float, entered: float
    ) -> Iterator[float]:
        """`entered`, part of `held`, is the input of the first block itself."""
        for number in range(count):
            own = in_dim * frames * area - (entered if number == 0 else 0)
            kept = held + own + (out_dim * frames * area if in_dim != out_dim else 0)
            yield self._conv(in_dim, out_dim, frames, area, kept)
            yield self._conv(out_dim, out_dim, frames, area, kept, second=True)
            in_dim = out_dim

    def _conv(self, in_dim: int, out_dim: int, frames: float, area: float, kept: float, second: bool = False) -> float:
        """Input, the same behind two remembered frames, those frames, and the output.

        Of a still the norm before it is fuller: of a block's second convolution it reads what is not among `kept`.
        """
        if self.still:
            return kept + area * (3 * in_dim if second else in_dim + max(in_dim, out_dim))
        self.history += 2 * in_dim * area
        return kept + area * (in_dim * (2 * frames + 4) + out_dim * frames)

    def _up(self, dim: int, frames: float, area: float, temporal: bool, held: float) -> Iterator[float]:
        out_dim = dim // 2 if self.old else dim
        if temporal:
            self.history += 2 * dim * area
            yield held + area * dim * (2 * frames + 4 + 2 * frames)
            frames *= 2
            yield held + area * dim * 2.5 * frames
        yield held + area * dim * frames + 4 * area * (dim + out_dim) * frames

    def _down(self, dim: int, frames: float, area: float, temporal: bool, held: float) -> Iterator[float]:
        yield held + area * dim * frames * 2.25
        if temporal:
            self.history += dim * area / 4
