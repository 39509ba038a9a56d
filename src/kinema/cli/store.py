"""`kinema models ...`: the model store as commands. What they do is in kinema.catalog and kinema.provision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from kinema.cli.flags import Call, option
from kinema.cli.interrupt import Interruption
from kinema.cli.tell import Teller, gigabytes, make_teller
from kinema.errors import CatalogError, RequestError
from kinema.schema import Settings, parse_bytes

if TYPE_CHECKING:  # each verb imports what it needs: `kinema --help` should not wait for the catalog
    from kinema.catalog.choice import Card
    from kinema.catalog.files import CatalogFile, Store
    from kinema.catalog.folders import Folders
    from kinema.catalog.moves import Move
    from kinema.provision import Provision

DEFAULT_RAM = 32 * 10**9


Names = Annotated[str, option("models, files, hf:OWNER/NAME:PATTERN or ms:OWNER/NAME", "NAME")]
Vram = Annotated[str | None, option("memory of the card, 16GB; default: this machine's")]
Ram = Annotated[str | None, option("memory of the machine, 32GB; default: this machine's, with --vram 32GB")]
Disk = Annotated[str | None, option("room for files, 60GB; default: not looked at")]
Task = Annotated[str | None, option("t2v, i2v, flf2v, ti2v, s2v, animate, vace, fun-control, flux, ..., or a model")]
PresetName = Annotated[str | None, option("a menu of models for a card: 8GB, 12GB, 16GB, 24GB, 32GB", "--preset")]
Loras = Annotated[bool, option("the four-step LoRAs too")]
Yes = Annotated[bool, option("do it; without it the moves are only listed")]
Place = Annotated[Path, option("folder", "FOLDER")]


def models(call: Call) -> int:
    """List the models Kinema knows, and which are installed."""
    from kinema.cli.plans import models_text

    with make_teller(call.json) as teller:
        teller.show(*models_text(call.configuration.settings))
    return 0


def search(call: Call, *words: Annotated[str, option("words all of which a file has", "WORD")]) -> int:
    """Find published files by name or by words, names that were never published included."""
    from kinema.catalog.files import find_files
    from kinema.cli.store_pages import files_page

    store, folders = _opened(call)
    found = find_files(_some(words, "search", "WORD"), store)
    with make_teller(call.json) as teller:
        teller.show(*files_page(found, folders))
    return 0


def show(call: Call, *words: Annotated[str, option("a model or a file", "NAME")]) -> int:
    """Show a model with all its files, or a file with all that is known of it."""
    from kinema.catalog.files import find_files
    from kinema.catalog.table import named
    from kinema.cli.store_pages import files_page, model_page

    store, folders = _opened(call)
    name = _some(words, "show", "NAME")
    model = named(name, store.published)
    page = model_page(model, store, folders) if model else files_page(find_files(name, store), folders, True)
    with make_teller(call.json) as teller:
        teller.show(*page)
    return 0


def plan(
    call: Call,
    *,
    task: Task = None,
    preset: PresetName = None,
    vram: Vram = None,
    ram: Ram = None,
    disk: Disk = None,
    loras: Loras = False,
) -> int:
    """Say which files to take for a card, and why; what they come to, and what more memory would bring."""
    from kinema.cli.store_pages import plan_page
    from kinema.provision import improvements, provide_all

    store, folders = _opened(call)
    card, made = _chosen(store, task, preset, loras, {"--vram": vram, "--ram": ram, "--disk": disk})
    made, left = (made, []) if made else provide_all(store, card, with_loras=loras)
    more = {one.model.name: tuple(improvements(one, store, card, with_loras=loras)) for one in made if not preset}
    with make_teller(call.json) as teller:
        for sentence in left:
            teller.say(sentence)
        teller.show(*plan_page(made, card, folders, more))
    return 0


def pull(
    call: Call,
    *names: Names,
    task: Task = None,
    preset: PresetName = None,
    vram: Vram = None,
    ram: Ram = None,
    disk: Disk = None,
    loras: Loras = False,
    to: Annotated[Path | None, option("models folder to write to")] = None,
    source: Annotated[Literal["hf", "ms"], option("hf: Hugging Face or HF_ENDPOINT; ms: ModelScope")] = "hf",
) -> int:
    """Fetch the files of models, tasks, presets or repositories: resumable, hash-checked, once for all processes."""
    from kinema.provision import order

    store, _ = _opened(call)
    if not names and not task and not preset:
        raise RequestError(
            "nothing to pull", "type: kinema models pull NAME, --task TASK or --preset 16GB", field="NAME"
        )
    card, made = _chosen(store, task, preset, loras, {"--vram": vram, "--ram": ram, "--disk": disk})
    asked = order(names, store, card, with_loras=loras, also=made)
    with make_teller(call.json) as teller:
        for note in asked.notes:
            teller.say(note)
        pull_files(asked.files, asked.addresses, call.configuration.settings, teller, to=to, source=source)
    return 0


def verify(
    call: Call,
    *paths: Annotated[Path, option("files or folders; default: all that is searched", "PATH")],
    full: Annotated[bool, option("read every byte, not headers alone")] = False,
) -> int:
    """Say whether files are what their names say: right, truncated, altered, another model, unknown."""
    from kinema.catalog.verify import checkpoints
    from kinema.catalog.verify import verify as check
    from kinema.weights.files import SUFFIXES

    store, folders = _opened(call)
    given: list[Path] = []
    for path in paths:
        if not path.exists():
            raise CatalogError(f"{path}: no such file or folder", "see: kinema models paths", name=str(path))
        given += sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    faults = 0
    with make_teller(call.json) as teller:
        for path in given if paths else checkpoints(folders):
            verdict = check(path, store, full=full)
            faults += verdict.is_fault
            data = {"path": str(path), "finding": verdict.finding, "says": verdict.says, "by": verdict.by}
            teller.show(f"{verdict.finding:<13} {path}: {verdict.says} (by {verdict.by})", data)
    return 4 if faults else 0


def where(call: Call, *words: Annotated[str, option("a model or a file", "NAME")]) -> int:
    """Print where the files of a name lie on this machine."""
    from kinema.catalog.files import find_files
    from kinema.catalog.table import named

    store, folders = _opened(call)
    name = _some(words, "where", "NAME")
    model = named(name, store.published)
    rows = (
        [file for group in store.groups(model).values() for file in group] if model else find_files(name, store).files
    )
    places = {str(place): file for file in rows if (place := folders.locate(file))}
    if not places:
        raise CatalogError(f"no file of {name} is installed", f"type: kinema models pull {name}", name=name)
    with make_teller(call.json) as teller:
        data = [{"path": path, "repository": file.repository, "role": file.role} for path, file in places.items()]
        teller.show("\n".join(places), data)
    return 0


def usage(call: Call) -> int:
    """Print what the models folders hold, by folder, links to the same bytes counted once."""
    _, folders = _opened(call)
    seen: set[tuple[int, int]] = set()
    totals: dict[str, int] = {}
    for root in folders.roots:
        for path in sorted(root.rglob("*")) if root.is_dir() else ():
            if not path.is_file():
                continue
            stat = path.stat()
            if (stat.st_dev, stat.st_ino) not in seen:
                seen.add((stat.st_dev, stat.st_ino))
                folder = str(root / path.relative_to(root).parts[0])
                totals[folder] = totals.get(folder, 0) + stat.st_size
    lines = [f"{gigabytes(size):>10}  {folder}" for folder, size in sorted(totals.items(), key=lambda row: -row[1])]
    with make_teller(call.json) as teller:
        teller.show("\n".join([*lines, f"{gigabytes(sum(totals.values())):>10}  together"]), totals)
    return 0


def paths(call: Call) -> int:
    """Print every folder that is searched, in order, and where pulled files go."""
    from kinema.catalog.folders import store_root

    _, folders = _opened(call)
    pulled_to = str(store_root(call.configuration.settings))
    lines = ["models folders:", *(f"  {_there(root)}" for root in folders.roots)]
    for key, places in folders.by_key.items():
        here = [place for place in places if place.is_dir()]
        lines += [f"{key}:", *(f"  {place}" for place in here)] if here else []
    lines += ["hub caches:", *(f"  {_there(cache)}" for cache in folders.caches)]
    lines += [f"pulled files go to: {pulled_to}"]
    data = {
        "roots": [str(root) for root in folders.roots],
        "store": pulled_to,
        "folders": {key: [str(place) for place in places] for key, places in folders.by_key.items()},
        "caches": [str(cache) for cache in folders.caches],
    }
    with make_teller(call.json) as teller:
        teller.show("\n".join(lines), data)
    return 0


def prune(call: Call, *, yes: Yes = False) -> int:
    """Throw away what broken pulls left behind; files that are whole are never touched."""
    from kinema.catalog.moves import leftovers

    _, folders = _opened(call)
    return _moves(call, leftovers(folders.roots), [], yes)


def import_files(call: Call, folder: Place, /, *, to: Annotated[Path | None, option("models folder")] = None) -> int:
    """Link known files of a ComfyUI folder or a hub cache into the models folder, without copying."""
    from kinema.catalog.folders import store_root
    from kinema.catalog.moves import imports

    store, _ = _opened(call)
    moves, left = imports(folder, store_root(call.configuration.settings, to), store)
    return _moves(call, moves, [f"left out: {line}" for line in left], yes=True)


def migrate(
    call: Call,
    old: Annotated[Path, option("models folder, or ComfyUI's own", "OLD")],
    new: Annotated[Path, option("where its files shall be", "NEW")],
    /,
    *,
    link: Annotated[bool, option("link files instead of moving them")] = False,
    yes: Yes = False,
) -> int:
    """Bring a models folder to another place, and tell ComfyUI by an extra_model_paths.yaml."""
    from kinema.catalog.moves import migration, write_yaml, yaml_text

    moves = migration(old, new, link=link)
    code = _moves(call, moves, [], yes)
    if yes:
        written = write_yaml(old, new)
        with make_teller(call.json) as teller:
            note = f"wrote {written}" if written else f"ComfyUI has a yaml already; add to it:\n{yaml_text(new)}"
            teller.say(note)
    return code


# --- shared -----------------------------------------------------------------------------------------


def pull_files(
    files: Sequence[CatalogFile],
    addresses: Sequence[str],
    settings: Settings,
    teller: Teller,
    *,
    to: Path | None = None,
    source: Literal["hf", "ms"] = "hf",
) -> None:
    """Fetch catalog files and whole repositories into the models folder, telling progress."""
    from kinema.catalog.folders import store_root
    from kinema.catalog.pull import pull as fetch
    from kinema.catalog.pull import wanted_of

    root, rows = store_root(settings, to), wanted_of(files, addresses, settings.hub, source)
    size = sum(file.bytes or 0 for file in files)
    count = f"{len(rows)} file{'s' * (len(rows) != 1)}"
    teller.say(f"{count}{f', about {gigabytes(size)},' if size else ''} to {root}")
    with Interruption() as cancelled:
        try:
            for event in fetch(rows, root, settings.hub, cancelled=cancelled):
                teller.event(event)
        except CatalogError as error:
            if error.details.get("gated"):
                error.hint += _open_copy(error.details["name"], files, settings)
            raise
    places = [str(root / row.place) for row in rows]
    teller.show("\n".join(places), {"paths": places})


def _open_copy(gated: str, files: Sequence[CatalogFile], settings: Settings) -> str:
    """Say where a gated file can be had without a login; "" where it cannot."""
    from kinema.catalog.files import alternatives, load_store

    for file in (file for file in files if f"{file.repository}/{file.path}" == gated):
        for copy in alternatives(file, load_store(settings.catalogs))[:1]:
            return f"\nor take the copy that needs no login: kinema models pull {copy.repository}/{copy.path}"
    return ""


def _amount(text: str, flag: str) -> int:
    try:
        if amount := parse_bytes(text):
            return amount
    except ValueError:
        pass
    raise RequestError(f"{flag} {text!r} is no amount of memory", f"pass {flag} 16GB", field=flag, got=text)


def _opened(call: Call) -> tuple[Store, Folders]:
    from kinema.catalog.files import load_store
    from kinema.catalog.folders import Folders

    settings = call.configuration.settings
    return load_store(settings.catalogs), Folders.of(settings)


def _chosen(
    store: Store, task: str | None, menu: str | None, loras: bool, sizes: Mapping[str, str | None]
) -> tuple[Card, list[Provision]]:
    """The card that is meant, and what it takes of a task or a preset; nothing where neither is named."""
    from kinema.catalog.choice import Card
    from kinema.provision import models_of, preset, provide

    vram, ram, disk = (_amount(text, flag) if text else None for flag, text in sizes.items())
    if menu and (task or vram or loras):
        other = f"--task {task}" if task else "--vram" if vram else "--loras"
        raise RequestError(f"--preset {menu} and {other} both say what", "leave one out", field="preset", got=menu)
    if menu:
        return preset(menu, store, ram or DEFAULT_RAM, disk)
    if vram:
        card = Card(vram, ram or DEFAULT_RAM, disk)
    else:
        from kinema.runtime.machine import probe_machine

        card = Card.of(probe_machine(), ram=ram, disk=disk)
    wanted = models_of(task, store) if task else ()
    return card, [provide(model, store, card, with_loras=loras) for model in wanted]


def _moves(call: Call, moves: Sequence[Move], notes: Sequence[str], yes: bool) -> int:
    from kinema.catalog.moves import carry_out
    from kinema.cli.store_pages import moves_page

    with make_teller(call.json) as teller:
        teller.show(*moves_page(moves, notes))
        if yes:
            carry_out(moves)
        elif moves:
            teller.say("nothing was done yet: add --yes")
    return 0


def _some(words: Sequence[str], verb: str, what: str) -> str:
    if not words:
        raise RequestError(f"kinema models {verb} of what?", f"type: kinema models {verb} {what}", field=what, got=None)
    return " ".join(words)


def _there(folder: Path) -> str:
    return f"{folder}{'' if folder.is_dir() else ' (not there)'}"


def pull_missing(error: CatalogError, settings: Settings, teller: Teller) -> None:
    """Fetch what a run lacks, as its error says: the files it names, or an address."""
    from kinema.catalog.files import load_store, one_file

    asked = error.details["pull"]
    if asked.startswith(("hf:", "ms:")):
        return pull_files((), (asked,), settings, teller)
    store = load_store(settings.catalogs)
    files = [file for name in error.details.get("files", (asked,)) for file in one_file(name, store).files]
    pull_files(files, (), settings, teller)
