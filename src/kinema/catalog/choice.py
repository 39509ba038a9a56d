"""Which of several files a card gets: what is on offer, in which precision, and the first that runs well.

How an offer runs is asked of a Judge, who plans it; nothing here knows of memory but the text encoder's share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kinema.catalog.files import CatalogFile, Store
from kinema.schema import CatalogEntry, Machine

ORDER = (
    "16-bit", "fp8_scaled", "Q8_0", "int8", "fp8_e5m2_scaled", "Q6_K", "fp8", "Q5_K_M", "Q5_1", "Q5_K_S", "Q5_0",
    "Q4_K_M", "Q4_1", "Q4_K_S", "Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
)  # fmt: skip
"""Precisions that are read, best first. Plain fp8 stands low: it rounds norms and biases too."""

TEXT_ENCODER_SHARE = 0.45  # of the card: it leaves, but not before the DiT's first blocks arrive

Mode = Literal["resident", "streamed", "from disk", "too big"]
"""How a DiT runs, best first: it stays on the card; its blocks are streamed from RAM, or from disk; it does not."""


@dataclass(frozen=True)
class Offer:
    """Files that fill all roles of one model in one precision: of two experts both."""

    files: tuple[CatalogFile, ...]

    @property
    def precision(self) -> str:
        return self.files[0].precision

    @property
    def largest(self) -> int:
        """Bytes of the largest file: of two experts one is on the card at a time."""
        return max(file.bytes or 0 for file in self.files)

    @property
    def together(self) -> int:
        return sum(file.bytes or 0 for file in self.files)


@dataclass(frozen=True)
class Card:
    """What a machine has, in bytes; vram 0 is a CPU alone, disk None is not looked at."""

    vram: int
    ram: int
    disk: int | None = None
    fp8_matmul: bool = False
    bfloat16: bool = True

    @classmethod
    def of(cls, machine: Machine, vram: int | None = None, ram: int | None = None, disk: int | None = None) -> Card:
        """Return what a machine has, with amounts given instead."""
        own = 0 if machine.device == "cpu" else machine.memory_total
        return cls(vram or own, ram or machine.ram_total, disk, machine.fp8_matmul, machine.bfloat16)


@dataclass(frozen=True)
class Choice:
    """An offer and how it runs."""

    offer: Offer
    mode: Mode


Judge = Callable[[Offer], Mode]


def kind(precision: str) -> str | None:
    """Return which of ORDER a precision of files.toml is; None where Kinema does not read it."""
    word = precision.split(" ")[0]
    if word.casefold() in ("bf16", "fp16", "fp32", "f16", "f32", "16-bit", "fp16/bf16", "as", "mixed_bf16"):
        return "16-bit"
    if re.fullmatch(r"fp8(_e4m3fn)?_scaled(_kj)?(_v2)?|fp8(_e4m3_scaled)?_lightx2v", word):
        return "fp8_scaled"
    if word.startswith("int8"):
        return "int8"
    if word.startswith("fp8_e5m2_scaled"):
        return "fp8_e5m2_scaled"
    if word in ("fp8", "fp8_e4m3fn", "fp8_e5m2"):
        return "fp8"
    return word if word in ORDER else None


def rank(precision: str) -> int:
    """Return the place in ORDER, after all of it where Kinema does not read the precision."""
    name = kind(precision)
    return ORDER.index(name) if name else len(ORDER)


def offers(model: CatalogEntry, store: Store) -> list[Offer]:
    """Return the DiTs of a model in every precision that is read and whose size is known, best first."""
    roles = model.dit_roles
    groups: dict[tuple[str, str], dict[str, CatalogFile]] = {}
    for file in store.serving(model.dit_of or model.name):
        if file.role in roles and _is_plain(file):
            groups.setdefault((file.repository, file.precision), {}).setdefault(file.role, file)
    whole = [Offer(tuple(group[role] for role in roles)) for group in groups.values() if len(group) == len(roles)]
    return sorted(whole, key=_preference)


def part_offers(part: str, store: Store) -> list[Offer]:
    """Return the files of a shared part, best first."""
    wanted = store.parts[part].role
    found = [file for file in store.serving(part) if file.role == wanted and _is_plain(file) and file.folder]
    return sorted((Offer((file,)) for file in found), key=_preference)


def tokenizer_of(part: str, store: Store) -> CatalogFile:
    """Return the tokenizer of a text encoder: a file, or a folder."""
    rows = [file for file in store.serving(part) if file.role in ("tokenizer", "clip_tokenizer")]
    return min(rows, key=lambda file: file.folder is None)  # of umT5's many the one with a place of its own


def with_tokenizer(encoder: CatalogFile, store: Store) -> tuple[CatalogFile, ...]:
    """Return an encoder with its tokenizer where its file does not hold it: ComfyUI's umT5 files and GGUF files do."""
    holds = encoder.serves("umt5-xxl") and (
        encoder.repository.startswith("Comfy-Org/") or encoder.name.endswith(".gguf")
    )
    part = next((part for part in ("umt5-xxl", "t5-xxl", "clip-l") if encoder.serves(part)), None)
    return (encoder,) if holds or part is None else (encoder, tokenizer_of(part, store))


def loras(model: CatalogEntry, store: Store) -> tuple[CatalogFile, ...]:
    """Return the four-step LoRAs of a model: one, or one an expert, of the first repository that has them."""
    found: dict[str | None, CatalogFile] = {}
    for file in store.serving(model.name):
        if file.role == "lora" and re.search(r"(?i)4step|lightx2v", file.name):
            found.setdefault(file.expert, file)
    pair = "high" in model.experts
    chosen = [found[expert] for expert in (model.experts if pair else (None, "high")) if expert in found]
    return tuple(chosen if pair and len(chosen) == 2 else chosen[:1])


def choose(given: Sequence[Offer], judge: Judge, disk: int | None = None) -> Choice | None:
    """Return the best offer that runs; None where nothing is on offer within the disk.

    Best is first in ORDER. 16-bit weights have to stay on the card to be taken before smaller ones; the others may be
    streamed block by block from RAM. Where RAM cannot hold them either, the smallest is read from disk.
    """
    judged = []
    for offer in (offer for offer in given if disk is None or offer.together <= disk):
        mode = judge(offer)
        if mode == "resident" or (mode == "streamed" and kind(offer.precision) != "16-bit"):
            return Choice(offer, mode)
        judged.append(Choice(offer, mode))
    return min(judged, key=lambda one: (get_args(Mode).index(one.mode), one.offer.largest), default=None)


def choose_part(given: Sequence[Offer], card: Card) -> Offer | None:
    """Return the best file of a shared part within its share of the card, else the smallest: it runs on the CPU."""
    room = (card.vram or card.ram) * TEXT_ENCODER_SHARE
    return next((offer for offer in given if offer.largest <= room), min(given, key=lambda o: o.largest, default=None))


def nearest(given: Iterable[Offer], precision: str) -> Offer | None:
    """Return the offer of this precision, else the nearest: of the same bits first, then by its place in ORDER."""
    wanted = rank(precision)

    def distance(offer: Offer) -> tuple[bool, bool, int]:
        same = kind(offer.precision) == kind(precision)
        return not same, offer.precision[:4] != precision[:4], abs(rank(offer.precision) - wanted)

    return min(given, key=distance, default=None)


def _preference(offer: Offer) -> tuple[int, int]:
    """Best precision first; fp32 after 16-bit, of which it is twice the bytes for the same result."""
    wide = offer.precision.casefold().startswith(("fp32", "f32"))
    return rank(offer.precision), 2 if wide else 1 if offer.files[0].known == "computed" else 0


def _is_plain(file: CatalogFile) -> bool:
    """A file of known size that is read, of a name that was seen, and is not fine-tuned."""
    return bool(file.bytes and kind(file.precision)) and not file.tuned and file.known != "guessed"
