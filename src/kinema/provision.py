"""Which files make a model run on a machine: chosen from the catalog, with what they cost and what more would bring.

Joins the catalog to the arithmetic of planning. Looks at no file; a machine is a Card of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kinema.catalog.choice import (
    Card,
    Choice,
    Offer,
    choose,
    choose_part,
    loras,
    nearest,
    offers,
    part_offers,
    with_tokenizer,
)
from kinema.catalog.files import CatalogFile, FileSet, Store, find_set, one_file
from kinema.errors import CatalogError, MachineError
from kinema.planning.activations import dit_bytes, ffn_pieces

TIERS = tuple(size * 10**9 for size in (8, 12, 16, 24, 32, 48, 80))
"""Cards that the tables answer for, in bytes."""

TEXT_ROWS = 512


@dataclass(frozen=True)
class Provision:
    """Everything one model needs on one card.

    files    in the order of roles: DiT, shared parts, LoRAs.
    mode     how the DiT runs there; peak_bytes of the card, at `size` and `frames`.
    notes    sentences: substitutions, what would be better with more.
    """

    set: FileSet
    files: tuple[CatalogFile, ...]
    mode: str
    peak_bytes: int
    size: tuple[int, int]
    frames: int
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.bytes or 0 for file in self.files)

    @property
    def precision(self) -> str:
        return self.files[0].precision


def activation_bytes(item: FileSet, store: Store) -> float:
    """Return what sampling needs beside the weights, at the size the set is planned for, two branches of guidance."""
    shape = store.shapes[item.shape]
    width, height = shape.size
    config = {"dim": shape.dim, "ffn_dim": shape.ffn_dim, "num_layers": shape.num_layers}
    latent_frames = (shape.frames - 1) // 4 + 1
    rows, columns = height // shape.stride, width // shape.stride
    tokens = latent_frames * (rows // 2) * (columns // 2)
    part = -(-tokens // ffn_pieces(config, 2))
    return dit_bytes(config, tokens, 2 * TEXT_ROWS, 2, branches=2, ffn_tokens=part)


def provide(item: FileSet, store: Store, card: Card, *, with_loras: bool = False) -> Provision:
    """Return the best files of a model for a card; MachineError where the disk holds none."""
    parts = [choose_part(part_offers(part, store), card) for part in item.parts]
    encoders = (file for offer in parts if offer for file in offer.files)
    shared = tuple(one for file in encoders for one in with_tokenizer(file, store))
    extra = loras(item, store) if with_loras else ()
    taken = sum(file.bytes or 0 for file in (*shared, *extra))
    left = replace(card, disk=None if card.disk is None else card.disk - taken)
    on_offer = offers(item, store)
    shape, activations = store.shapes[item.shape], activation_bytes(item, store)
    num_layers = shape.num_layers
    choice = choose(on_offer, left, activations, num_layers)
    if choice is None:
        raise _no_room(item, on_offer, card, taken)
    notes = _notes(item, choice, on_offer, left, activations, num_layers)
    streamed = 2 * choice.offer.largest / num_layers
    weights = choice.offer.largest if choice.mode == "resident" else streamed
    files = (*choice.offer.files, *shared, *extra)
    return Provision(item, files, choice.mode, round(weights + activations), shape.size, shape.frames, notes)


def provide_precision(item: FileSet, precision: str, store: Store, card: Card, *, with_loras: bool) -> Provision:
    """Return a model's files in one precision, or the nearest that was published, which a note then says."""
    offer = nearest(offers(item, store), precision)
    if offer is None:
        raise CatalogError(f"no file of {item.name} is known with its size", name=item.name)
    only = Store(tuple(f for f in store.files if f.role not in ("dit", "dit_high") or f in offer.files), store.sets)
    only = replace(only, parts=store.parts, shapes=store.shapes)
    made = provide(item, only, card, with_loras=with_loras)
    if offer.precision.casefold() == precision.casefold():
        return replace(made, notes=())
    names = " and ".join(file.name for file in offer.files)
    return replace(
        made, notes=(f"{item.name} in {precision} was not published; nearest is {offer.precision}: {names}",)
    )


def preset(name: str, store: Store) -> list[Provision]:
    """Return the models of a preset, in the precisions of its menu."""
    key = next((key for key in store.presets if key.casefold() == name.casefold().replace(" ", "")), None)
    if key is None:
        raise CatalogError(f"no preset is called {name!r}; there are {', '.join(store.presets)}", name=name)
    card = Card(int(key.removesuffix("GB")) * 10**9, 64 * 10**9)
    lines = store.presets[key].lines
    return [provide_precision(store.sets[x.set], x.precision, store, card, with_loras=x.loras) for x in lines]


@dataclass(frozen=True)
class Order:
    """What names stand for: files, addresses of repositories, and sentences about both."""

    files: tuple[CatalogFile, ...]
    addresses: tuple[str, ...]
    notes: tuple[str, ...]


def order(
    names: Sequence[str], store: Store, card: Card, *, with_loras: bool = False, also: Sequence[Provision] = ()
) -> Order:
    """Return what has to be fetched for names: of a model its best files for the card, a file itself, an address."""
    made, files, notes = list(also), list[CatalogFile](), list[str]()
    addresses = tuple(name for name in names if name.startswith(("hf:", "ms:")))
    for name in (name for name in names if name not in addresses):
        if item := find_set(name, store):
            made.append(provide(item, store, card, with_loras=with_loras))
        else:
            found = one_file(name, store)
            files += found.files
            notes += [found.note] if found.note else []
    for one in made:
        notes += [f"{one.set.name}: {one.precision}, {one.bytes / 1e9:.1f} GB, {one.mode}", *one.notes]
    return Order(tuple(dict.fromkeys([*distinct(made), *files])), addresses, tuple(notes))


def sets_of(task: str, store: Store) -> list[FileSet]:
    """Return the models for a task, or the one model of that name; CatalogError names the tasks."""
    wanted = task.casefold()
    named = find_set(task, store)
    found = [item for item in store.sets.values() if wanted in item.tasks] or ([named] if named else [])
    if not found:
        raise CatalogError(f"no task or model is called {task!r}; tasks: {', '.join(tasks(store))}", name=task)
    return found


def tasks(store: Store) -> list[str]:
    return list(dict.fromkeys(task for item in store.sets.values() for task in item.tasks))


def distinct(provisions: Iterable[Provision]) -> list[CatalogFile]:
    """Return the files of several models, shared ones once."""
    return list(dict.fromkeys(file for made in provisions for file in made.files))


def _notes(
    item: FileSet, choice: Choice, on_offer: Sequence[Offer], card: Card, activations: float, num_layers: int
) -> tuple[str, ...]:
    """Say how the choice runs, and the next card, RAM or disk that changes it."""
    notes = [_SENTENCES[choice.mode]] if choice.mode in _SENTENCES else []
    for what, cards in (
        ("VRAM", [replace(card, vram=tier) for tier in TIERS if tier > card.vram]),
        ("RAM", [replace(card, ram=tier) for tier in (32 * 10**9, 64 * 10**9, 128 * 10**9) if tier > card.ram]),
        ("disk", [replace(card, disk=None)] if card.disk is not None else []),
    ):
        for more in cards:
            better = choose(on_offer, more, activations, num_layers)
            if better and (better.offer != choice.offer or better.mode != choice.mode):
                amount = {"VRAM": f"{more.vram // 10**9} GB of ", "RAM": f"{more.ram // 10**9} GB of "}.get(
                    what, "more "
                )
                notes.append(f"with {amount}{what}: {better.offer.precision}, {better.mode}")
                break
    return tuple(notes)


_SENTENCES = {
    "streamed": "the blocks of the DiT are streamed from RAM while it runs",
    "from disk": "RAM cannot hold the DiT: its blocks are read from disk at every step, which is slow",
    "too big": "at the size it is planned for this does not fit; make videos smaller or shorter",
}


def _no_room(item: FileSet, on_offer: Sequence[Offer], card: Card, taken: int) -> KinemaFault:
    if not on_offer:
        return CatalogError(f"no file of {item.name} is known with its size", name=item.name)
    smallest = min(offer.together for offer in on_offer) + taken
    return MachineError(
        f"{item.name} needs {smallest / 1e9:.1f} GB of disk at least; {(card.disk or 0) / 1e9:.1f} GB are given",
        "free some, or name a smaller model",
        need=smallest,
        have=card.disk,
    )


KinemaFault = CatalogError | MachineError
