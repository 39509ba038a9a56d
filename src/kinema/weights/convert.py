"""Any checkpoint that can be read, written as any other: in other names, other numbers, another container.

Rows pass in chunks, so that memory stays far below the size of the file. What was written is read back by the reader
that will load it, and must hold exactly the numbers that were meant.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from kinema.errors import OutputError, RequestError
from kinema.schema import Component, FileFacts, Note, Progress
from kinema.weights.detect import inspect
from kinema.weights.keys import translate
from kinema.weights.passage import STORED, Adjust, Passage, Rows
from kinema.weights.proof import Proof, compared
from kinema.weights.quantised.blocks import BLOCK_TYPES
from kinema.weights.quantised.layers import packable
from kinema.weights.quantised.packed import NUMBER_TYPES
from kinema.weights.quantised.schemes import open_weights
from kinema.weights.spelling import parts_of, spell
from kinema.weights.structure import build
from kinema.weights.writing import Written, in_memory, whole_file, write_tensors


@dataclass(frozen=True)
class Format:
    """What the large matrices of a file become; everything else keeps its numbers, unless `whole`.

    kind    a dtype, a name of NUMBER_TYPES or of BLOCK_TYPES; None keeps each tensor as it is stored.
    scales  as in `quantise`.
    whole   all floating-point tensors get this dtype, not the matrices alone.
    """

    container: str
    kind: torch.dtype | str | None
    scales: str = "none"
    whole: bool = False


FORMATS: dict[str, Format] = {
    "float32": Format("safetensors", torch.float32, whole=True),
    "bfloat16": Format("safetensors", torch.bfloat16, whole=True),
    "float16": Format("safetensors", torch.float16, whole=True),
    "fp8_e4m3": Format("safetensors", "fp8_e4m3"),
    "fp8_e5m2": Format("safetensors", "fp8_e5m2"),
    "fp8_scaled": Format("safetensors", "fp8_e4m3", "tensor"),
    "fp8_channel": Format("safetensors", "fp8_e4m3", "channel"),
    "int8_channel": Format("safetensors", "int8", "channel"),
    "F32": Format("gguf", torch.float32, whole=True),
    "F16": Format("gguf", torch.float16),
    "BF16": Format("gguf", torch.bfloat16),
    **{kind: Format("gguf", kind) for kind, block in BLOCK_TYPES.items() if block.quantise},
}
"""By the name given to --to. fp8_scaled is spelt as ComfyUI does, scales by channel as LightX2V does."""

SUFFIXES = {"safetensors": ".safetensors", "gguf": ".gguf"}
GGUF_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ARCHITECTURES: Mapping[Component, str] = {
    "dit": "wan",
    "flux_dit": "flux",
    "text_encoder": "t5encoder",
    "t5": "t5encoder",
}
"""What GGUF files of each component call themselves; others have no place in GGUF."""


@dataclass(frozen=True)
class Converted:
    """What was written, what that changed, and what the user may not expect of it."""

    facts: FileFacts
    proof: Proof
    notes: tuple[Note, ...]


def convert(
    source: Path,
    target: Path,
    to: str | None = None,
    names: str | None = None,
    *,
    overwrite: bool = False,
    adjust: Adjust | None = None,
) -> Generator[Progress, None, Converted]:
    """Write `source` as `target`, yielding progress and returning what was written.

    to      a name of FORMATS; None keeps every number as it is stored.
    names   a dialect of its component; by default its own, and llama.cpp's for a T5 in GGUF.

    Peak memory is a few chunks (see `passage`) beside mapped pages, which are given back.
    Raises RequestError for what cannot be, CheckpointError for a source that cannot be read or a result that is not
    what was meant, OutputError where it cannot be written. Nothing is left of a file that is not whole.
    """
    wanted = _format(source, target, to, overwrite)
    rows = Rows(translate(open_weights(source)), adjust)
    conversion = _Conversion(rows, inspect(source), wanted, names)
    tensors = conversion.tensors()
    _check_room(target, sum(tensor.bytes for tensor in tensors))
    with whole_file(target) as temporary:
        written = write_tensors(temporary, tensors, conversion.metadata(), wanted.container)
        for number, _ in enumerate(written, 1):
            yield Progress(stage="convert", done=number, total=len(tensors))
        proof = yield from compared(temporary, conversion.facts, conversion.passages)
    facts = inspect(target)
    return Converted(facts, proof, conversion.notes())


def _format(source: Path, target: Path, to: str | None, overwrite: bool) -> Format:
    container = next((name for name, suffix in SUFFIXES.items() if target.suffix == suffix), None)
    if container is None:
        problem = f"{target} ends neither in .safetensors nor in .gguf"
        raise RequestError(problem, f"write to {target.with_suffix('.safetensors')}", field="OUT", got=str(target))
    if to is not None and to not in FORMATS:
        problem = f"to {to!r} is no format; there are {', '.join(FORMATS)}"
        near = next(iter(get_close_matches(to, FORMATS, 1)), "bfloat16")
        raise RequestError(problem, f"pass --to {near}", field="to", got=to, allowed=list(FORMATS))
    wanted = Format(container, None) if to is None else FORMATS[to]
    if wanted.container != container:
        right = target.with_suffix(SUFFIXES[wanted.container])
        problem = f"{to} is a {wanted.container} format, and {target.name} is not named so"
        raise RequestError(problem, f"write to {right}", field="to", got=to)
    if target.exists() and target.samefile(source):
        raise RequestError(f"{target} is the file to convert", "name another file", field="OUT", got=str(target))
    if target.exists() and not overwrite:
        raise RequestError(f"{target} exists", "pass --overwrite, or name another file", field="OUT", got=str(target))
    return wanted


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.is_dir())).free
    if size > free:
        problem = f"{target} needs {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there"
        raise OutputError(problem, "make room, or write to another disk", path=str(target))


class _Conversion:
    """Which tensor becomes what, under which name."""

    def __init__(self, rows: Rows, facts: FileFacts, wanted: Format, names: str | None) -> None:
        self.rows, self.facts, self.wanted = rows, facts, wanted
        self.translation, self.file = rows.translation, rows.translation.file
        component, gguf = facts.component, wanted.container == "gguf"
        if gguf and component not in ARCHITECTURES:
            problem = f"a {component.replace('_', ' ')} has no place in a GGUF file"
            raise RequestError(problem, "write a .safetensors file", field="OUT", got=wanted.container)
        if component == "clip_vision" and names not in (None, facts.dialect):
            problem = "the names of a CLIP vision encoder cannot be changed: its unused last block would be lost"
            raise RequestError(problem, "leave --names out", field="names", got=names)
        if names is None:
            llama = gguf and component in ("text_encoder", "t5")
            names = "gguf" if llama else "transformers" if facts.dialect == "gguf" else facts.dialect
        self.dialect, self.spelt = spell(component, names, self.translation.sources)
        leaves = packable(component, build(component, facts.config))
        self.matrices = {name for name, leaf in leaves if isinstance(leaf, nn.Linear)}
        self.passages = [self._passage(official) for official in self.translation.sources]

    def _passage(self, official: str) -> Passage:
        wanted, name = self.wanted, self.translation.sources[official].names[0]
        packed = self.file.packed(name)
        if packed is None:
            plain = self.file.dtype(name)
        elif wanted.kind is None:
            return self._as_stored(official, packed.kind)
        else:  # fp8 numbers are float16 numbers too; scaled ones, and those of blocks, need float32
            plain = torch.float16 if packed.kind.startswith("fp8") and packed.scale is None else torch.float32
        if plain.is_floating_point:
            if wanted.whole and isinstance(wanted.kind, torch.dtype):
                plain = wanted.kind
            elif wanted.kind is not None and official in self.matrices and self._divides(official):
                return Passage(self.rows, official, wanted.kind, wanted.scales)
        if wanted.container == "gguf" and plain not in GGUF_DTYPES:
            plain = torch.float32
        return Passage(self.rows, official, plain)

    def _divides(self, official: str) -> bool:
        """Whether rows are a multiple of the wanted block."""
        block = BLOCK_TYPES.get(str(self.wanted.kind))
        return block is None or self.translation.shape(official)[-1] % block.weights == 0

    def _as_stored(self, official: str, kind: str) -> Passage:
        packed, gguf = self.translation.packed(official), self.wanted.container == "gguf"
        if packed is None or packed.rotation or self.rows.adjust or (kind in BLOCK_TYPES) != gguf:
            example = "Q8_0" if gguf else "bfloat16"
            problem = f"{official} is {kind}, which cannot stay as it is in this {self.wanted.container} file"
            raise RequestError(problem, f"say what it is to become, such as --to {example}", field="to", got=None)
        return Passage(self.rows, official, kind, STORED)

    def tensors(self) -> list[Written]:
        """Return everything the file will hold, in the order of the source."""
        written: list[Written] = []
        for passage in self.passages:
            spelt = self.spelt[passage.official]
            for part, (begin, end) in zip(spelt, parts_of(spelt, passage.shape, self.facts.config), strict=True):
                written += passage.written(part, begin, end)
        # At the end: two bytes in front would put every number behind them out of line with the map.
        written += self._marker()
        written += [in_memory(name, self.file.get(name)) for name in self._carried()]
        if self.file.tokenizer and self.wanted.container != "gguf":
            pieces = torch.frombuffer(bytearray(self.file.tokenizer()), dtype=torch.uint8)
            written.append(in_memory("spiece_model", pieces))
        return written

    def _marker(self) -> list[Written]:
        """ComfyUI's mark of scaled fp8: two elements say that its weights are only to be unpacked."""
        packed = [passage for passage in self.passages if str(passage.kind) in NUMBER_TYPES]
        opted_out = {passage.weight_only for passage in packed}
        if len(opted_out) > 1:
            raise RequestError(
                f"{self.facts.path} says of some fp8 layers that they are not to be multiplied in fp8, of others not; "
                "that has no place in the file to be written",
                "say what it is to become, such as --to fp8_scaled or bfloat16",
                field="to",
                got=None,
            )
        if not any(passage.scale_name == "scale_weight" or passage.weight_only for passage in packed):
            return []
        marker = torch.zeros(2 if True in opted_out else 1, dtype=torch.float8_e4m3fn)
        return [in_memory(f"{self.dialect.prefix}scaled_fp8", marker)]

    def _ignored(self) -> list[str]:
        return [name for names in self.translation.ignored.values() for name in names]

    def _carried(self) -> list[str]:
        """Names that mean nothing to the model and go along: a tokenizer, and whatever else a CLIP file has."""
        if self.wanted.container == "gguf":
            return []
        return [name for name in self._ignored() if name == "spiece_model" or self.facts.component == "clip_vision"]

    def metadata(self) -> dict[str, str]:
        dropped = ("_quantization_metadata", "format", "general.architecture")
        kept = {key: value for key, value in self.file.metadata.items() if key not in dropped}
        if self.wanted.container == "gguf":
            kept["general.architecture"] = ARCHITECTURES[self.facts.component]
        return kept

    def notes(self) -> tuple[Note, ...]:
        found: list[Note] = []

        def say(about: str, names: list[str], text: str) -> None:
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                found.append(Note(about=about, text=f"{names[0]}{more} {text}"))

        wanted = [self.wanted.kind] if isinstance(self.wanted.kind, str) else []
        matrices = [passage for passage in self.passages if wanted and passage.official in self.matrices]
        plain = [passage.official for passage in matrices if passage.kind not in wanted]
        say("to", plain, "stay plain: their rows are no multiple of a block")
        left = [name for name in self._ignored() if name not in self._carried()]
        inside = ["the tokenizer"] if self.file.tokenizer and self.wanted.container == "gguf" else []
        inside += ["the tokenizer"] if "spiece_model" in left else []
        say("tokenizer", inside, "inside does not go along; pass --tokenizer later")
        say("names", [name for name in left if name != "spiece_model"], "is of no use to the model and left out")
        return tuple(found)
