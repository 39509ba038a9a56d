"""Write docs/which-model.md, and the tables in docs/models.md, from the catalog.

.venv/bin/python docs/make_model_pages.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kinema.catalog import load_catalog
from kinema.catalog.choice import Card, offers, part_offers
from kinema.catalog.files import CatalogFile, FileSet, Store, load_store
from kinema.provision import TIERS, Provision, preset, provide, sets_of, tasks
from kinema.schema import CatalogEntry

DOCS = Path(__file__).parent
RAM = 32 * 10**9
BEGIN, END = "<!-- {}: made by docs/make_model_pages.py -->", "<!-- end -->"

TASKS = {
    "t2v": "Video from text",
    "i2v": "Video from a picture",
    "flf2v": "Video between two pictures",
    "ti2v": "Video from text or a picture, 5B",
    "s2v": "A picture speaks",
    "animate": "A character moves as somebody does",
    "vace": "Control, inpaint, extend, reference",
    "fun-inp": "First and last picture, inpainting",
    "fun-control": "A control video",
    "fun-camera": "A camera move",
    "t2i": "Pictures from text, by a video model",
    "flux": "Pictures from text",
    "flux-kontext": "Edit a picture",
    "flux-fill": "Fill or extend a picture",
    "flux-canny": "A picture from edges",
    "flux-depth": "A picture from depth",
}

HEAD = """# Which model

Made by `docs/make_model_pages.py` from the catalog; do not edit it by hand.

For a machine of your own, `kinema models plan --task i2v --vram 16GB --ram 32GB` says which files to take and why, and
`kinema models pull` fetches them. GB are 10^9 bytes.

"""

MISTAKES = """## What guides get wrong

- The high-noise and the low-noise file of an A14B model are no two kinds of motion: a run uses both, one by one.
- Wan 2.2 image to video takes no CLIP vision file. Wan 2.1 image to video and Animate do.
- `wan2.2_vae` is no better `wan_2.1_vae`: it belongs to the 5B models, and fits no other.
- The four-step LoRAs come in pairs, one an expert. Swapped they load, and spoil the video.
- FLUX.1 makes pictures only. `flux1-dev-fp8.safetensors` of Comfy-Org (17.2 GB, in `checkpoints`) holds its encoders
  and autoencoder; the file of the same name of Kijai (11.9 GB) does not.
- Everything of black-forest-labs is gated, schnell too: a login that accepted the licence is needed. The autoencoder
  is published without a gate in Comfy-Org/Lumina_Image_2.0_Repackaged.

"""

HOW = """## How a choice is made

A file stays on the card when its bytes and what a forward of {size} needs beside them fit into 95 % of the
card, less 0.6 GB. Otherwise its blocks are streamed from RAM while it runs, which RAM has to hold together
with {system} for the system; of two experts both count. Of what runs this way the best precision is taken:
16-bit (only where it stays on the card), scaled fp8, Q8_0, int8, Q6_K, plain fp8, then the smaller ones. The
text encoder may take 45 % of the card. The tables below assume 32 GB of RAM.

"""


def which_model() -> str:
    """Return the text of docs/which-model.md."""
    store = load_store()
    use = _table(
        ("model", "for", "tasks", "licence"),
        [(f"`{s.name}`", s.use, ", ".join(s.tasks), _licence(s, store)) for s in store.sets.values()],
    )
    parts = [HEAD, "## By use\n\n", use, MISTAKES]
    parts += [HOW.format(size="the planned size, with guidance,", system="4 GB")]
    parts += [_task(task, store) for task in tasks(store)]
    return "".join([*parts, _presets(store)]).rstrip() + "\n"


def tables() -> str:
    """Return the tables of docs/models.md: what is published of each model and part."""
    store = load_store()
    models = [
        (f"`{item.name}`", _published(offer.files[0] for offer in offers(item, store)), _parts(item))
        for item in store.sets.values()
    ]
    parts = [
        (f"`{name}`", part.title, _published(offer.files[0] for offer in part_offers(name, store)))
        for name, part in store.parts.items()
    ]
    count = (
        f"{len(store.files):,} files of {len({file.repository for file in store.files})} repositories are known.\n\n"
    )
    return count + _table(("model", "published DiT, GB a file", "parts"), models) + _table(("part", "", "GB"), parts)


def defaults() -> str:
    """Return the table of models: what each takes, and what it does where a request says nothing."""
    columns = ("name", "makes", "takes", "size", "frames, fps", "steps", "shift", "guidance")
    return _table(columns, [_defaults(entry) for entry in load_catalog().values()])


def _defaults(entry: CatalogEntry) -> tuple[str, ...]:
    takes = [f"`--{name.replace('_', '-')}`" + ("!" if name in entry.needs else "") for name in entry.takes]
    length = "1" if entry.frames == 1 else f"{entry.clip_frames or entry.frames}, {entry.fps:g}"
    shift = "by size" if entry.shift_by_tokens else f"{entry.shift:g}"
    shift += f"; 480p {entry.shift_480p:g}" if entry.shift_480p else ""
    high = entry.guidance if entry.guidance_high is None else entry.guidance_high
    guidance = f"{high:g} high, {entry.guidance:g} low" if "high" in entry.experts else f"{entry.guidance:g}"
    size = f"{entry.size[0]}x{entry.size[1]}" + (" as area" if entry.by_area else "")
    return f"`{entry.name}`", entry.title, ", ".join(takes) or "-", size, length, f"{entry.steps}", shift, guidance


def models_page(text: str) -> str:
    """Return docs/models.md with its tables made anew."""
    for name, made in (("models", defaults()), ("published files", tables())):
        before, mark, rest = text.partition(BEGIN.format(name))
        text = f"{before}{mark}\n\n{made}{END}{rest.partition(END)[2]}"
    return text


def _task(task: str, store: Store) -> str:
    columns = ["model", *(f"{tier // 10**9} GB" for tier in TIERS)]
    rows = []
    for item in sets_of(task, store):
        made = [provide(item, store, Card(tier, RAM)) for tier in TIERS]
        rows.append([f"`{item.name}`", *(_cell(one) for one in made)])
    return f"## {task}: {TASKS[task][0].lower() + TASKS[task][1:]}\n\n{_table(columns, rows)}"


def _cell(made: Provision) -> str:
    how = {"resident": "", "streamed": ", streamed", "from disk": ", from disk", "too big": ", does not fit"}[made.mode]
    precision = made.precision.replace("_e4m3fn", "").replace("_kj", "").replace("_v2", "")
    return f"{precision}{how}; {made.bytes / 1e9:.0f} GB"


def _presets(store: Store) -> str:
    rows = []
    for name, menu in store.presets.items():
        for made in preset(name, store):
            rows.append((f"`{name}`", menu.title, f"`{made.set.name}`", made.precision, "; ".join(made.notes)))
    head = "## Presets\n\n`kinema models pull --preset 12GB` and so on take the menu of cards that guides print.\n\n"
    return head + _table(
        ("preset", "card", "model", "precision", "where the menu names what was never published"), rows
    )


def _published(files: Iterable[CatalogFile]) -> str:
    sizes: dict[str, float] = {}
    for file in files:
        sizes.setdefault(file.precision, (file.bytes or 0) / 1e9)
    return ", ".join(f"{precision} {size:.{2 if size < 1 else 1}f}" for precision, size in sizes.items())


def _parts(item: FileSet) -> str:
    return ", ".join(f"`{part}`" for part in item.parts)


def _licence(item: FileSet, store: Store) -> str:
    return next((file.licence for file in store.serving(item.name) if file.licence), "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n\n"


if __name__ == "__main__":
    (DOCS / "which-model.md").write_text(which_model())
    (DOCS / "models.md").write_text(models_page((DOCS / "models.md").read_text()))
