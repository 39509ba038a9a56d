"""Write the tables of docs/memory.md from plans of full-size models, whose layouts are in tests/formats/manifests.

.venv/bin/python docs/make_memory_page.py
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Mapping
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
    "wan2.2-animate-14b": (
        {"dit": "wan2.2_animate_14B", "clip_vision": "clip_vision_h_official"},
        ("832x480", "1280x720"),
        {"reference": IMAGE, "pose": CLIP, "face": CLIP.model_copy(update={"width": 512, "height": 512})},
    ),
    "wan2.1-vace-14b": ({"dit": "wan2.1_vace_14B"}, ("832x480", "1280x720"), {"control": CLIP}),
    "flux.1-dev": (
        {"dit": "flux1_dev", "vae": "flux1_ae", "text_encoder": "t5xxl_encoder_transformers",
         "clip_text": "clip_l_transformers"},
        ("1024x1024", "2048x1536"),
        {},
    ),
}  # fmt: skip


@cache
def facts_of(layout: str, folder: Path, role: str) -> FileFacts:
    return inspect(write_sparse(folder / f"{role}-{layout}.safetensors", manifest(layout)))


def request_of(model: str, **fields: object) -> Request:
    inputs = {field: facts.path for field, facts in ROWS[model][2].items()}
    return Request(model=model, prompt="a cat walks on grass", seed=1, **inputs, **fields)


def plan_on(request: Request, card: int, folder: Path) -> Plan:
    """Return the plan of a request on a card of so many GB, beside 64 GB on the host; MachineError where none fits."""
    layouts, _, media = ROWS[request.model]
    all_layouts = {"vae": "wan2.1_vae", "text_encoder": "umt5_xxl_encoder_official", **layouts}
    files = {role: facts_of(layout, folder, role) for role, layout in all_layouts.items()}
    machine = Machine(
        device="cuda", name="the card", memory_total=card * 10**9, memory_free=card * 10**9,
        ram_total=64 * 10**9, ram_free=60 * 10**9,
    )  # fmt: skip
    facts = Facts(files=files, media={field: (one,) for field, one in media.items()}, machine=machine)
    return make_plan(request, load_catalog()[request.model], facts)


Answer = Plan | MachineError


def answers(folder: Path) -> dict[tuple[str, str, int], Answer]:
    """Return what planning answers, by model, size and card."""
    found: dict[tuple[str, str, int], Answer] = {}
    for model, (_, sizes, _) in ROWS.items():
        for size, card in itertools.product(sizes, CARDS):
            try:
                found[model, size, card] = plan_on(request_of(model, size=size), card, folder)
            except MachineError as error:
                found[model, size, card] = error
    return found


def told(answer: Answer) -> str:
    """Return one cell: how the DiT is held, what else was chosen, and the highest peak; or what fits instead."""
    if isinstance(answer, MachineError):
        return "no: " + (" or ".join(answer.details["fits"]) or "nothing smaller fits")
    expert = next(iter(answer.experts.values()))
    count, stay = len(block_parameters(expert)), expert.resident_blocks
    said = ["all blocks stay" if stay is None else f"{stay} of {count} blocks stay"]
    said += ["text encoder streamed"] if answer.text_encoder.resident_blocks is not None else []
    said += ["VAE cache on the host"] if answer.vae_cache == "cpu" else []
    said += [f"tiles of {answer.tile}"] if answer.tile else []
    return f"{', '.join(said)}; {max(cost.peak_bytes for cost in answer.costs) / 1e9:.1f} GB"


def tables(found: Mapping[tuple[str, str, int], Answer]) -> str:
    text = MARK
    for model, (_, sizes, _) in ROWS.items():
        text += f"\n### {model}\n\n| card | {' | '.join(sizes)} |\n|---|{'---|' * len(sizes)}\n"
        for card in CARDS:
            text += f"| {card} GB | {' | '.join(told(found[model, size, card]) for size in sizes)} |\n"
    return text


if __name__ == "__main__":
    page = PAGE.read_text()
    with tempfile.TemporaryDirectory() as name:
        PAGE.write_text(page[: page.index(MARK)] + tables(answers(Path(name))))
