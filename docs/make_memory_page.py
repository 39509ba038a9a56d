"""Write the tables of docs/memory.md from plans of full-size models, whose layouts are in tests/formats/manifests.

.venv/bin/python docs/make_memory_page.py
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from checkpoints import manifest, write_sparse  # noqa: E402
from kinema.catalog import load_catalog  # noqa: E402
from kinema.errors import MachineError  # noqa: E402
from kinema.planning import make_plan  # noqa: E402
from kinema.planning.memory import block_parameters  # noqa: E402
from kinema.schema import Facts, FileFacts, Machine, MediaFacts, Plan, Request  # noqa: E402
from kinema.weights.detect import inspect  # noqa: E402

PAGE = Path(__file__).parent / "memory.md"
MARK = "<!-- made by docs/make_memory_page.py -->\n"
CARDS = (8, 12, 16, 24, 32, 48, 80)
IMAGE = MediaFacts(path=Path("image.png"), kind="image", width=1280, height=720)
SOUND = MediaFacts(path=Path("talk.wav"), kind="audio", seconds=5.0, rate=16000, channels=1)
CLIP = MediaFacts(path=Path("clip.mp4"), kind="video", width=1280, height=720, frames=81, fps=16, seconds=81 / 16)

# Model: layouts of its files by role, sizes, and the inputs it needs.
ROWS: dict[str, tuple[dict[str, str], tuple[str, ...], dict[str, MediaFacts]]] = {
    "wan2.2-t2v-a14b": ({"dit": "wan2.2_t2v_a14B", "dit_high": "wan2.2_t2v_a14B"}, ("832x480", "1280x720"), {}),
    "wan2.2-i2v-a14b": (
        {"dit": "wan2.2_i2v_a14B", "dit_high": "wan2.2_i2v_a14B"}, ("832x480", "1280x720"), {"first": IMAGE}
    ),
    "wan2.2-ti2v-5b": ({"dit": "wan2.2_ti2v_5B", "vae": "wan2.2_vae"}, ("832x480", "1280x704"), {}),
    "wan2.2-s2v-14b": (
        {"dit": "wan2.2_s2v_14B", "audio_encoder": "wav2vec2_large_transformers"},
        ("832x448", "1024x704"),
        {"reference": IMAGE, "audio": SOUND},
    ),
    "wan2.1-vace-14b": ({"dit": "wan2.1_vace_14B"}, ("832x480", "1280x720"), {"control": CLIP}),
}  # fmt: skip


@cache
def facts_of(layout: str, folder: Path, role: str) -> FileFacts:
    return inspect(write_sparse(folder / f"{role}-{layout}.safetensors", manifest(layout)))


def plan_on(model: str, size: str, card: int, folder: Path) -> Plan:
    """Return the plan of a model on a card of so many GB, beside 64 GB of host memory; MachineError where none fits."""
    layouts, _, media = ROWS[model]
    entry = load_catalog()[model]
    all_layouts = {"vae": "wan2.1_vae", "text_encoder": "umt5_xxl_encoder_official", **layouts}
    files = {role: facts_of(layout, folder, role) for role, layout in all_layouts.items()}
    machine = Machine(
        device="cuda", name="the card", memory_total=card * 10**9, memory_free=card * 10**9,
        ram_total=64 * 10**9, ram_free=60 * 10**9,
    )  # fmt: skip
    inputs = {field: facts.path for field, facts in media.items()}
    request = Request(model=model, prompt="a cat walks on grass", size=size, seed=1, **inputs)
    facts = Facts(files=files, media={field: (one,) for field, one in media.items()}, machine=machine)
    return make_plan(request, entry, facts)


def told(model: str, size: str, card: int, folder: Path) -> str:
    """Return one cell: how the DiT is held, what else was chosen, and the highest peak; or what fits instead."""
    try:
        plan = plan_on(model, size, card, folder)
    except MachineError as error:
        return "no: " + (" or ".join(error.details["fits"]) or "nothing smaller fits")
    expert = next(iter(plan.experts.values()))
    count = len(block_parameters(expert))
    stay = "all blocks stay" if expert.resident_blocks is None else f"{expert.resident_blocks} of {count} blocks stay"
    more = [stay]
    more += ["text encoder streamed"] if plan.text_encoder.resident_blocks is not None else []
    more += ["VAE cache on the host"] if plan.vae_cache == "cpu" else []
    more += [f"tiles of {plan.tile}"] if plan.tile else []
    return f"{', '.join(more)}; {max(cost.peak_bytes for cost in plan.costs) / 1e9:.1f} GB"


def tables() -> str:
    text = MARK
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, (_, sizes, _) in ROWS.items():
            text += f"\n### {model}\n\n| card | {' | '.join(sizes)} |\n|---|{'---|' * len(sizes)}\n"
            for card in CARDS:
                cells = " | ".join(told(model, size, card, folder) for size in sizes)
                text += f"| {card} GB | {cells} |\n"
    facts_of.cache_clear()
    return text


if __name__ == "__main__":
    page = PAGE.read_text()
    PAGE.write_text(page[: page.index(MARK)] + tables())
