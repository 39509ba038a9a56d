"""Which files make a model run on a machine: chosen from the catalog by planning a run of each, as `kinema plan` does.

Joins the catalog to planning. Looks at no file; a machine is a Card of numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kinema.catalog.choice import (
    Card,
    Choice,
    Judge,
    Mode,
    Offer,
    choose,
    choose_part,
    kind,
    loras,
    nearest,
    offers,
    part_offers,
    with_tokenizer,
)
from kinema.catalog.files import CatalogFile, Store, one_file
from kinema.catalog.layouts import dit_layouts, header, load_layouts
from kinema.catalog.table import named
from kinema.errors import CatalogError, KinemaError, MachineError
from kinema.planning import make_plan
from kinema.schema import CatalogEntry, Facts, Machine, MediaFacts, Plan, Request

TIERS = tuple(size * 10**9 for size in (8, 12, 16, 24, 32, 48, 80))
"""Cards that the tables answer for, in bytes."""

RAMS = tuple(size * 10**9 for size in (32, 64, 128))
SYSTEM = 4_000_000_000  # of the RAM: the system and this process


@dataclass(frozen=True)
class Provision:
    """Everything one model needs on one card.

    files   in the order of roles: DiT, shared parts, LoRAs.
    trial   the plan of a run of `size` from them, or why there is none.
    notes   sentences: substitutions, and how it runs where that is not as a whole on the card.
    """

    model: CatalogEntry
    files: tuple[CatalogFile, ...]
    mode: Mode
    trial: Plan | MachineError
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.bytes or 0 for file in self.files)

    @property
    def precision(self) -> str:
        return self.files[0].precision

    @property
    def peak_bytes(self) -> int:
        """Memory of the card at the fullest stage; where it does not fit, what it would take."""
        if isinstance(self.trial, MachineError):
            return int(self.trial.details.get("need") or 0)
        return max(cost.peak_bytes for cost in self.trial.costs)


# --- a run of files that are not here -------------------------------------------------------------------


def trial_size(model: CatalogEntry) -> tuple[int, int]:
    """Return the size that files are chosen for: the smallest, in landscape, that a model was made for."""
    if model.structure.get("speech") or model.structure.get("animate"):
        return 832, 448  # theirs follows from the inputs
    wide = [size for size in model.sizes if size[0] >= size[1]]
    return min(wide, key=lambda size: size[0] * size[1], default=model.size)


def trial_request(
    model: CatalogEntry, card: Card, size: tuple[int, int] | None = None
) -> tuple[Request, dict[str, tuple[MediaFacts, ...]]]:
    """Return the request that files are chosen by, and the facts of inputs it names: those the model cannot do without.

    `kinema plan --model NAME --size WxH --vram V --ram R` with inputs such as these plans the same run.
    """
    width, height = size or trial_size(model)
    seconds = model.frames / model.fps
    known = {
        "image": MediaFacts(path=Path("image.png"), kind="image", width=width, height=height),
        "video": MediaFacts(
            path=Path("video.mp4"), kind="video", width=width, height=height, frames=model.frames, fps=model.fps,
            seconds=seconds,
        ),
        "audio": MediaFacts(path=Path("talk.wav"), kind="audio", seconds=5.0, rate=16_000, channels=1),
    }  # fmt: skip
    known["face"] = known["video"].model_copy(update={"width": 512, "height": 512})
    kinds = {"pose": "video", "face": "face", "audio": "audio"}
    kinds |= {"control": "video"} if model.family == "wan" else {}
    fields = (field for field in model.needs if field != "camera")
    media: dict[str, tuple[MediaFacts, ...]] = {field: (known[kinds.get(field, "image")],) for field in fields}
    inputs = {field: facts[0].path for field, facts in media.items()}
    limits = {"vram": card.vram, "ram": card.ram} if card.vram else {"ram": card.ram}
    request = Request(
        model=model.name, prompt="a cat walks on grass", size=f"{width}x{height}", seed=0, **limits, **inputs,
        camera="pan left" if "camera" in model.needs else None,
    )  # fmt: skip
    return request, media


class Trials:
    """Plans of runs of one model on one card, each from files as the catalog describes them."""

    def __init__(self, model: CatalogEntry, store: Store, card: Card, size: tuple[int, int] | None = None) -> None:
        self.model, self.card, self.size = model, card, size
        layouts = load_layouts()
        picked = {role: choose_part(part_offers(part, store), card) for role, part in model.parts.items()}
        self.parts = {role: offer.files[0] for role, offer in picked.items() if offer}
        self._facts = {role: header(file, layouts[model.parts[role]]) for role, file in self.parts.items()}
        self._layouts = dit_layouts(model)
        if not self._layouts:
            raise CatalogError(
                f"{model.name} has a structure of its own, so that its memory cannot be planned from the catalog",
                "pull its files by their names, one by one",
                name=model.name,
            )
        self._made: dict[Offer, Plan | MachineError] = {}

    @cached_property
    def machine(self) -> Machine:
        if not self.card.vram:
            ram = self.card.ram
            return Machine(memory_total=ram, memory_free=ram, ram_total=ram, bfloat16=self.card.bfloat16)
        return Machine(
            device="cuda", name=f"a card of {self.card.vram / 1e9:g} GB", memory_total=self.card.vram,
            memory_free=self.card.vram, ram_total=self.card.ram, ram_free=self.card.ram,
            fp8_matmul=self.card.fp8_matmul, bfloat16=self.card.bfloat16,
        )  # fmt: skip

    def plan(self, offer: Offer) -> Plan | MachineError:
        """Return the plan of a run of these DiTs with the model's parts, or why it cannot fit."""
        if offer not in self._made:
            request, media = trial_request(self.model, self.card, self.size)
            dits = {file.role: header(file, self._layouts[0]) for file in offer.files}
            try:
                facts = Facts(files={**dits, **self._facts}, media=media, machine=self.machine)
                self._made[offer] = make_plan(request, self.model, facts)
            except MachineError as error:
                self._made[offer] = error
        return self._made[offer]

    def mode(self, offer: Offer) -> Mode:
        made = self.plan(offer)
        if isinstance(made, MachineError):
            return "too big"
        streams = any(ref.resident_blocks is not None for ref in made.experts.values())
        if (streams or not self.card.vram) and offer.together + SYSTEM > self.card.ram:
            return "from disk"
        return "streamed" if streams else "resident"


# --- choosing -------------------------------------------------------------------------------------------


def judge(model: CatalogEntry, store: Store, card: Card) -> Judge | None:
    """Return who says how files of a model run on a card; None for a model of unknown structure."""
    return Trials(model, store, card).mode if dit_layouts(model) else None


def provide(model: CatalogEntry, store: Store, card: Card, *, with_loras: bool = False) -> Provision:
    """Return the best files of a model for a card; MachineError where the disk holds none."""
    trials = Trials(model, store, card)
    shared = [one for file in trials.parts.values() for one in with_tokenizer(file, store)]
    extra = loras(model, store) if with_loras else ()
    choice = _choice(model, store, trials, sum(file.bytes or 0 for file in (*shared, *extra)))
    trial = trials.plan(choice.offer)
    slow = "RAM cannot hold the DiT: its blocks are read from disk at every step, which is slow"
    notes = [slow] if choice.mode == "from disk" else []
    if isinstance(trial, MachineError):
        notes.append(f"{trial.message}; {trial.hint}")
    return Provision(model, (*choice.offer.files, *shared, *extra), choice.mode, trial, tuple(notes))


def provide_all(store: Store, card: Card, *, with_loras: bool = False) -> tuple[list[Provision], list[str]]:
    """Return the best files of every model for a card, and a sentence for each of which they cannot be told."""
    made, left = [], []
    for model in store.published.values():
        try:
            made.append(provide(model, store, card, with_loras=with_loras))
        except CatalogError as error:
            left.append(f"{error.message}: {error.hint}")
    return made, left


def improvements(made: Provision, store: Store, card: Card, *, with_loras: bool = False) -> Iterator[str]:
    """Yield what the next larger card, more RAM or more disk would bring, where they bring something."""
    if made.model.size != trial_size(made.model):
        yield _at_its_own_size(made, store, card)
    steps: Sequence[tuple[str, Iterable[Card]]] = (
        ("VRAM", (replace(card, vram=tier) for tier in TIERS if card.vram and tier > card.vram)),
        ("RAM", (replace(card, ram=size) for size in RAMS if size > card.ram)),
        ("disk", (replace(card, disk=None),) if card.disk is not None else ()),
    )
    for what, cards in steps:
        for more in cards:
            better = provide(made.model, store, more, with_loras=with_loras)
            if (better.files[0], better.mode) != (made.files[0], made.mode):
                amount = {"VRAM": f"{more.vram / 1e9:.0f} GB of ", "RAM": f"{more.ram / 1e9:.0f} GB of "}
                yield f"with {amount.get(what, 'more ')}{what}: {better.precision}, {better.mode}"
                break


def _at_its_own_size(made: Provision, store: Store, card: Card) -> str:
    """Say whether the same files make what a request without --size asks for."""
    size = "x".join(map(str, made.model.size))
    dits = Offer(tuple(file for file in made.files if file.role in made.model.dit_roles))
    larger = Trials(made.model, store, card, made.model.size).plan(dits)
    return f"at {size}: {larger.hint if isinstance(larger, MachineError) else 'fits too'}"


def provide_precision(model: CatalogEntry, precision: str, store: Store, card: Card, *, with_loras: bool) -> Provision:
    """Return a model's files in one precision, or the nearest that was published, which a note then says."""
    offer = nearest(offers(model, store), precision)
    if offer is None:
        raise _unknown_size(model)
    only = replace(store, files=tuple(f for f in store.files if f.role not in model.dit_roles or f in offer.files))
    made = provide(model, only, card, with_loras=with_loras)
    if offer.precision.casefold() == precision.casefold():
        return made
    names = " and ".join(file.name for file in offer.files)
    text = f"{model.name} in {precision} was not published; nearest is {offer.precision}: {names}"
    return replace(made, notes=(text, *made.notes))


def preset(name: str, store: Store, ram: int = RAMS[0], disk: int | None = None) -> tuple[Card, list[Provision]]:
    """Return the card of a preset and its models, in the precisions of its menu."""
    key = next((key for key in store.presets if key.casefold() == name.casefold().replace(" ", "")), None)
    if key is None:
        raise CatalogError(f"no preset is called {name!r}; there are {', '.join(store.presets)}", name=name)
    card = Card(int(key.removesuffix("GB")) * 10**9, ram, disk)
    made = [
        provide_precision(store.models[line.model], line.precision, store, card, with_loras=line.loras)
        for line in store.presets[key].lines
    ]
    return card, made


def lacking(made: Provision, roles: Collection[str]) -> list[CatalogFile]:
    """Return the files of a provision that fill `roles`, their tokenizers with them."""
    brought = {"text_encoder": "tokenizer", "clip_text": "clip_tokenizer"}
    wanted = {*roles, *(brought[role] for role in roles if role in brought)}
    return [file for file in made.files if file.role in wanted]


# --- what names stand for -------------------------------------------------------------------------------


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
        if model := named(name, store.published):
            made.append(provide(model, store, card, with_loras=with_loras))
        else:
            found = one_file(name, store)
            files += found.files
            notes += [found.note] if found.note else []
    for one in made:
        notes += [f"{one.model.name}: {one.precision}, {one.bytes / 1e9:.1f} GB, {one.mode}", *one.notes]
    return Order(tuple(dict.fromkeys([*distinct(made), *files])), addresses, tuple(notes))


def models_of(task: str, store: Store) -> list[CatalogEntry]:
    """Return the models for a task, or the one model of that name; CatalogError names the tasks."""
    if found := [model for model in store.published.values() if task.casefold() in model.tasks]:
        return found
    if one := named(task, store.published):
        return [one]
    raise CatalogError(f"no task or model is called {task!r}; tasks: {', '.join(tasks(store))}", name=task)


def tasks(store: Store) -> list[str]:
    return list(dict.fromkeys(task for model in store.models.values() for task in model.tasks))


def distinct(provisions: Iterable[Provision]) -> list[CatalogFile]:
    """Return the files of several models, shared ones once."""
    return list(dict.fromkeys(file for made in provisions for file in made.files))


def _choice(model: CatalogEntry, store: Store, trials: Trials, taken: int) -> Choice:
    on_offer, disk = offers(model, store), trials.card.disk
    packed = [offer for offer in on_offer if kind(offer.precision) != "16-bit"]
    if packed and trials.mode(smallest := min(packed, key=lambda offer: offer.largest)) == "too big":
        on_offer = [offer for offer in on_offer if offer not in packed or offer == smallest]  # nor do the larger ones
    choice = choose(on_offer, trials.mode, None if disk is None else disk - taken)
    if choice:
        return choice
    if not on_offer:
        raise _unknown_size(model)
    least = min(offer.together for offer in on_offer) + taken
    raise MachineError(
        f"{model.name} needs {least / 1e9:.1f} GB of disk at least; {(disk or 0) / 1e9:.1f} GB are given",
        "free some, or name a smaller model",
        need=least,
        have=disk,
    )


def _unknown_size(model: CatalogEntry) -> KinemaError:
    return CatalogError(
        f"no file of {model.name} is known with its size",
        f"give bytes to its rows, in a catalog file of yours (used_by = [{model.name!r}])",
        name=model.name,
    )
