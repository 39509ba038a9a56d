"""One tensor on its way from a checkpoint to another: its rows, in chunks, and what they are stored as.

Owns arithmetic and memory: a chunk at a time, however large the tensor. What becomes what is `convert`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinema.errors import CheckpointError
from kinema.weights.keys import Translation
from kinema.weights.quantised.blocks import BLOCK_TYPES
from kinema.weights.quantised.packed import LARGEST, NUMBER_TYPES, Packed, quantise
from kinema.weights.spelling import Spelt
from kinema.weights.writing import Written

CHUNK = 2**20
"""Weights that are in memory at a time, in float32."""

STORED = "stored"
"""Instead of scales: packed as the source has it, bit for bit."""

Adjust = Callable[[str, int, Tensor], Tensor]
"""adjust(official name, first row, rows in float32) -> rows: what is added to weights on their way, as a LoRA is."""


@dataclass(frozen=True)
class Rows:
    """The tensors of a checkpoint by official name, a few rows at a time, in float32."""

    translation: Translation
    adjust: Adjust | None = None

    def get(self, official: str, begin: int, end: int) -> Tensor:
        """Return these rows; a tensor without axes is one row. Of joined tensors only the rows asked for are read."""
        source = self.translation.sources[official]
        if source.lead or source.tail or source.swap or not self.translation.shape(official):
            whole = self.translation.read(official)
            rows = whole[begin:end] if whole.ndim else whole
        else:
            pieces = list(self._pieces(source.names, begin, end))
            rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        rows = rows.float()
        return rows if self.adjust is None else self.adjust(official, begin, rows)

    def _pieces(self, names: Sequence[str], begin: int, end: int) -> Iterator[Tensor]:
        """What each of these tensors, one behind the other, holds of the rows."""
        file = self.translation.file
        for name in names:
            height = file.shape(name)[0]
            part = slice(max(begin, 0), max(min(end, height), 0))
            if part.start < part.stop:
                packed = file.packed(name)
                yield packed.rows(part).dequantised() if packed else file.get(name)[part]
            begin, end = begin - height, end - height

    def spans(self, official: str, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut rows into chunks, giving back the pages of each once it is done with."""
        step = max(1, CHUNK // max(1, torch.Size(self.translation.shape(official)[1:]).numel()))
        for start in range(begin, end, step):
            yield start, min(end, start + step)
            self.translation.file.release()


class Passage:
    """One official tensor, and what it is stored as.

    kind    a dtype, or a name of NUMBER_TYPES or BLOCK_TYPES.
    scales  of a packed kind, as in `quantise`, or STORED.
    """

    def __init__(self, rows: Rows, official: str, kind: torch.dtype | str, scales: str = "none") -> None:
        self.rows, self.official, self.kind, self.scales = rows, official, kind, scales
        self.shape = rows.translation.shape(official)
        self._scale: Tensor | None = None  # of the whole tensor
        self._row_scales: list[Tensor] = []

    def encoded(self, start: int, stop: int) -> Tensor | Packed:
        """Return rows as they are stored. Raises CheckpointError for numbers that have no place there."""
        if (packed := self._stored) is not None:
            return packed.rows(slice(start, stop))
        rows = self.rows.get(self.official, start, stop)
        if isinstance(self.kind, torch.dtype):
            stored = rows.to(self.kind)
            self._check_fit(stored.isfinite())
            return stored
        limit = LARGEST[self.kind] if self.scales == "none" and self.kind in LARGEST else torch.finfo(rows.dtype).max
        self._check_fit(rows.abs() <= limit)
        if self.scales == "tensor" and self._scale is None:
            self._scale = self._whole_scale()
        return quantise(rows, self.kind, self.scales, self._scale)

    def _check_fit(self, fits: Tensor) -> None:
        if not bool(fits.all()):
            path = self.rows.translation.file.path
            raise CheckpointError(
                f"{path}: {self.official} does not fit into {self.kind}, or is not finite",
                "Take --to bfloat16, whose range is that of float32.",
                path=path,
                key=self.official,
            )

    def meant(self, start: int, stop: int) -> Tensor:
        """Return the numbers, float32, that rows have once they are stored."""
        encoded = self.encoded(start, stop)
        return encoded.dequantised() if isinstance(encoded, Packed) else encoded.float()

    @property
    def _stored(self) -> Packed | None:
        """The source's own packed weight, where that is what is written."""
        return self.rows.translation.packed(self.official) if self.scales == STORED else None

    @property
    def scale_name(self) -> str:
        """What goes behind a layer's name for its scale: ComfyUI's first word for one of fp8, else everybody's."""
        if (shape := self._scale_shape(1)) is None:
            return ""
        return "weight_scale" if shape or self.kind == "int8" else "scale_weight"

    @property
    def weight_only(self) -> bool:
        """Whether it is not to be multiplied in fp8: as the source says; ComfyUI has no scale for its input."""
        packed = self._stored
        return packed.weight_only if packed else self.scales == "tensor"

    def written(self, part: Spelt, begin: int, end: int) -> Iterator[Written]:
        """Yield what rows begin to end become in the file: the tensor under the part's name, and its scale."""
        rule = part.rule
        whole = (end - begin, *self.shape[1:]) if self.shape else ()
        shape = whole[rule.lead : len(whole) - rule.tail]
        middle = (begin + end) // 2
        spans = [(middle, end), (begin, middle)] if rule.swap else [(begin, end)]
        yield Written(part.name, shape, NUMBER_TYPES.get(str(self.kind), self.kind), lambda: self._chunks(spans))
        scale_shape = self._scale_shape(end - begin)
        if scale_shape is not None:
            name = part.name.removesuffix("weight") + self.scale_name
            yield Written(name, scale_shape, torch.float32, self._scales)

    def _scale_shape(self, rows: int) -> tuple[int, ...] | None:
        if (packed := self._stored) is not None:
            scale = packed.scale
            return None if scale is None else (rows, *scale.shape[1:]) if scale.ndim else ()
        shapes: dict[str, tuple[int, ...]] = {"tensor": (), "channel": (rows, 1)}
        return None if self.kind in BLOCK_TYPES else shapes.get(self.scales)

    def _chunks(self, spans: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        self._row_scales = []
        for begin, end in spans:
            for start, stop in self.rows.spans(self.official, begin, end):
                encoded = self.encoded(start, stop)
                if isinstance(encoded, Packed):
                    if encoded.scale is not None:
                        self._row_scales.append(encoded.scale)
                    encoded = encoded.data
                yield encoded

    def _scales(self) -> Iterator[Tensor]:
        """The scales of the chunks just made: one for all of them, or each its rows'."""
        yield from self._row_scales if self._row_scales[0].ndim else self._row_scales[:1]

    def _whole_scale(self) -> Tensor | None:
        spans = self.rows.spans(self.official, 0, self.shape[0])
        largest = torch.stack([self.rows.get(self.official, *span).abs().amax() for span in spans]).amax()
        return quantise(largest.reshape(1, 1), str(self.kind), "tensor").scale
