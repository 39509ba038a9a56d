"""Write docs/which-model.md, and the tables in docs/models.md, from the catalog.

.venv/bin/python docs/make_model_pages.py
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kinema.catalog import load_catalog
from kinema.catalog.choice import Card, offers, part_offers
from kinema.catalog.files import CatalogFile, Store, load_store
from kinema.provision import TIERS, Provision, models_of, preset, provide, tasks, trial_size
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
    "flux-redux": "Variations of a picture",
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

A run of each file is planned as `kinema plan --vram --ram` does, at the size in the tables and the model's own number
of frames. Files whose plan keeps all blocks of the DiT on the card are resident. Where only some stay, the others are
streamed from RAM, which has to hold the files together with 4 GB for the system; of two experts both count. Of what
runs this way the best precision is taken: 16-bit (only where it stays on the card), scaled fp8, Q8_0, int8, Q6_K,
plain fp8, then the smaller ones. The text encoder takes 45 % of the card at most. The tables assume 32 GB of RAM; the
last number is that of all files together.

"""


def which_model() -> str:
    """Return the text of docs/which-model.md."""
    store = load_store()
    use = _table(
        ("model", "for", "tasks", "licence"),
        [(f"`{m.name}`", m.use, ", ".join(m.tasks), _licence(m, store)) for m in store.published.values()],
    )
    parts = [HEAD, "## By use\n\n", use, MISTAKES]
    assert set(TASKS) == set(tasks(store)), "a task without a title"
    parts += [HOW, *(_task(task, store) for task in TASKS)]
    return "".join([*parts, _presets(store)]).rstrip() + "\n"


def tables() -> str:
    """Return the tables of docs/models.md: what is published of each model and part."""
    store = load_store()
    models = [
        (f"`{model.name}`", _published(offer.files[0] for offer in offers(model, store)), _parts(model))
        for model in store.published.values()
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
    columns = ["model", "size", *(f"{tier // 10**9} GB" for tier in TIERS)]
    rows = []
    for model in models_of(task, store):
        made = [provide(model, store, Card(tier, RAM)) for tier in TIERS]
        size = "x".join(map(str, trial_size(model)))
        rows.append([f"`{model.name}`", size, *(_cell(one) for one in made)])
    return f"## {task}: {TASKS[task][0].lower() + TASKS[task][1:]}\n\n{_table(columns, rows)}"


def _cell(made: Provision) -> str:
    how = {"resident": "", "streamed": ", streamed", "from disk": ", from disk", "too big": ", does not fit"}[made.mode]
    precision = made.precision.replace("_e4m3fn", "").replace("_kj", "").replace("_v2", "")
    return f"{precision}{how}; {made.bytes / 1e9:.0f} GB"


def _presets(store: Store) -> str:
    rows = []
    for name, menu in store.presets.items():
        for line, made in zip(menu.lines, preset(name, store)[1], strict=True):
            other = made.notes[0] if made.precision.casefold() != line.precision.casefold() else ""
            rows.append((f"`{name}`", menu.title, f"`{made.model.name}`", made.precision, other))
    head = "## Presets\n\n`kinema models pull --preset 12GB` and so on take the menu of cards that guides print.\n\n"
    return head + _table(
        ("preset", "card", "model", "precision", "where the menu names what was never published"), rows
    )


def _published(files: Iterable[CatalogFile]) -> str:
    sizes: dict[str, float] = {}
    for file in files:
        sizes.setdefault(file.precision, (file.bytes or 0) / 1e9)
    return ", ".join(f"{precision} {size:.{2 if size < 1 else 1}f}" for precision, size in sizes.items())


def _parts(model: CatalogEntry) -> str:
    return ", ".join(f"`{part}`" for part in model.parts.values())


def _licence(model: CatalogEntry, store: Store) -> str:
    return next((file.licence for file in store.serving(model.dit_of or model.name) if file.licence), "")


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n\n"


if __name__ == "__main__":
    (DOCS / "which-model.md").write_text(which_model())
    (DOCS / "models.md").write_text(models_page((DOCS / "models.md").read_text()))
