"""Every model's set is whole: pulled into an empty folder it runs with no further file, and as `models plan` said."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tokenizers

from checkpoints import BYTES
from kinema.catalog.choice import kind, offers
from kinema.catalog.files import CatalogFile, load_store
from kinema.catalog.layouts import Layout, dit_layouts, header, load_layouts
from kinema.catalog.pull import pull, wanted
from kinema.errors import CatalogError, MachineError
from kinema.models.tokenizer import CLIP_END, CLIP_START
from kinema.planning import make_plan
from kinema.provision import TIERS, Card, Provision, Trials, order, preset, provide, provide_all, trial_request
from kinema.schema import CatalogEntry, Facts, FileFacts, Plan, Request, Settings
from kinema.survey import survey
from kinema.weights.detect import inspect
from kinema.weights.gguf import gguf_header
from kinema.weights.quantised.blocks import BLOCK_TYPES
from sounds import save_sound, tone_with_clicks
from store import record_layouts
from store.hub import FakeHub, running_hub
from tiny_world import film, picture, spiece_model

STORE = load_store()
BIG, RAM = Card(80 * 10**9, 128 * 10**9), 32 * 10**9
MODELS = list(STORE.published.values())
SPIECE = spiece_model()
CLIP = tokenizers.Tokenizer(tokenizers.models.BPE({CLIP_START: 0, CLIP_END: 1}, [])).to_str().encode()
MATRIX = re.compile(r".*(block|injector).*(?<!pos_embedding\.embedding)(?<!relative_attention_bias)\.weight")
IN_FULL = {"Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}
IN_FULL |= {"Q3_K_L": "Q4_K", "Q6_K": "Q6_K", "Q2_K": "Q2_K"}


@cache
def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    return dict(record_layouts.layouts())


def layout_name(model: CatalogEntry, role: str) -> str:
    return (model.dit_of or model.name) if role in model.dit_roles else model.part(role)


def write_headers(path: Path, tensors: Mapping[str, tuple[int, ...]], precision: str, spiece: bytes = b"") -> None:
    """Write a file of published form: its header in full, numbers as a hole."""
    how = kind(precision) or "16-bit"
    path.parent.mkdir(parents=True, exist_ok=True)
    if how.startswith("Q"):
        return write_gguf(path, tensors, IN_FULL.get(how, how))
    rows: list[tuple[str, str, tuple[int, ...]]] = []
    plain = "F32" if "32" in precision else "F16" if "fp16" in precision else "BF16"
    for name, shape in tensors.items():
        if how == "16-bit" or len(shape) != 2 or not (MATRIX.fullmatch(name) or how == "fp8"):
            rows.append((name, plain, shape))
            continue
        rows.append((name, "I8" if how == "int8" else "F8_E4M3", shape))
        if how != "fp8":
            rows.append((name.removesuffix("weight") + "scale_weight", "F32", (shape[0], 1) if how == "int8" else ()))
    if how == "fp8_scaled":
        rows.append(("scaled_fp8", "F8_E4M3", (0,)))
    rows += [("spiece_model", "U8", (len(spiece),))] if spiece else []
    header, end = {}, 0
    for name, dtype, shape in rows:
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
        file.seek(8 + len(raw) + end - len(spiece))
        file.write(spiece)


def write_gguf(path: Path, tensors: Mapping[str, tuple[int, ...]], how: str) -> None:
    rows = []
    for name, shape in tensors.items():
        block, packs = BLOCK_TYPES[how], len(shape) == 2 and shape[1] % BLOCK_TYPES[how].weights == 0
        plain = "F32" if len(shape) == 1 else "F16"
        size = math.prod(shape) // block.weights * block.bytes if packs else BYTES[plain] * math.prod(shape)
        rows.append((name, shape, how if packs else plain, size))
    raw, starts = gguf_header(rows, {"general.architecture": "wan"})
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(starts[-1] + rows[-1][3] + 32)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("media")
    image, clip = picture(folder / "image.png"), film(folder / "clip.mp4")
    sound = save_sound(folder / "talk.wav", tone_with_clicks(1.0, 16_000, []), 16_000)
    return {"image": image, "video": clip, "audio": sound}


def facts_of(made: Provision, root: Path, media: dict[str, Path]) -> Facts:
    """Ask the survey for a run of a pulled set; the inputs' facts are then those of the trial."""
    request, inputs = trial_request(made.model, BIG)
    given = {field: media[facts[0].kind] for field, facts in inputs.items()}
    given |= {"control": media["image"]} if made.model.family == "flux" and "control" in inputs else {}
    fields = request.model_dump(exclude_unset=True, exclude={"vram", "ram"})
    asked = Request.model_validate(fields | given)
    _, facts = survey(asked, Settings(models=(root,), store=root))
    return facts


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        yield hub


def pulled(made: Provision, root: Path, hub: FakeHub) -> None:
    """Pull a set from a hub that holds small files, then put headers of full size in the places of checkpoints."""
    for file in made.files:
        inside = file.paths or tuple(f"{file.path}{name}" for name in ("spiece.model", "tokenizer_config.json"))
        for path in inside:
            small = {"spiece.model": SPIECE, "tokenizer.json": CLIP}
            hub.add(f"{file.repository}/{path}", small.get(path.rpartition("/")[2], b"{}"))
    list(pull(wanted(made.files), root, hub.hub, patience=0.0, connections=1))
    for file in made.files:
        if "tokenizer" not in file.role and file.role != "lora":
            place = root / file.place
            assert place.is_file(), "it was pulled to where it is looked for"
            holds = file.serves("umt5-xxl") and (file.repository.startswith("Comfy-Org") or place.suffix == ".gguf")
            dense = "bf16" if place.suffix == ".gguf" else file.precision
            write_headers(place, shapes()[layout_name(made.model, file.role)], dense, SPIECE if holds else b"")


SETS = {model.name: provide(model, STORE, BIG) for model in MODELS}
SETS |= {f"{name}, {made.model.name}": made for name in ("8GB", "12GB") for made in preset(name, STORE)[1]}


@pytest.mark.parametrize("name", SETS)
def test_nothing_is_missing_once_a_set_is_pulled(name: str, tmp_path: Path, media: dict[str, Path], hub: FakeHub):
    made = SETS[name]
    pulled(made, tmp_path, hub)
    facts = facts_of(made, tmp_path, media)
    assert set(facts.files) == set(made.model.roles)
    assert facts.tokenizer or facts.files["text_encoder"].has_tokenizer
    assert facts.clip_tokenizer or made.model.family != "flux"


@pytest.mark.parametrize(
    ("model", "role"), [("flux.1-dev", "tokenizer"), ("flux.1-dev", "clip_tokenizer"), ("wan2.1-t2v-1.3b", "tokenizer")]
)
def test_a_tokenizer_that_is_not_there_is_named_with_what_brings_it(
    model: str, role: str, tmp_path: Path, media: dict[str, Path], hub: FakeHub
):
    made = SETS[model]
    pulled(made, tmp_path, hub)
    for file in made.files:
        if file.role == role:
            (tmp_path / file.place).unlink()
    if model.startswith("wan"):  # a text encoder of another publisher, whose file holds none
        encoder = next(file for file in made.files if file.role == "text_encoder")
        write_headers(tmp_path / encoder.place, shapes()["umt5-xxl"], "fp16")
    with pytest.raises(CatalogError, match="no tokenizer") as caught:
        facts_of(made, tmp_path, media)
    assert f"kinema models pull {caught.value.details['pull']}" in caught.value.hint
    brought = order((caught.value.details["pull"],), STORE, BIG)
    assert [file.role for file in brought.files] == [role]
    lacks = replace(made, files=brought.files)
    pulled(lacks, tmp_path, hub)
    assert set(facts_of(made, tmp_path, media).files) == set(made.model.roles)


# --- models of the user ---------------------------------------------------------------------------------

OWN = """
[models.mine]
title = "A fine-tuned Wan"
structure = { dim = 5120, num_layers = 40, in_channels = 16, out_channels = 16, has_clip_tokens = false }
vae = "wan2.1"
size = [832, 480]
[repositories."me/mine"]
[[repositories."me/mine".files]]
path = "mine-Q8_0.gguf"
folder = "diffusion_models"
role = "dit"
precision = "Q8_0"
used_by = ["mine"]
bytes = 15_400_000_000
size = "exact"
"""


def test_a_model_of_the_user_is_planned_and_pulled_like_any_other(tmp_path: Path):
    catalog = tmp_path / "mine.toml"
    catalog.write_text(OWN)
    store = load_store((catalog,))
    made = provide(store.models["mine"], store, Card(12 * 10**9, RAM))
    assert (made.precision, made.mode) == ("Q8_0", "streamed") and {file.role for file in made.files} > {"vae"}
    assert made.files[0] in order(("mine",), store, BIG).files
    catalog.write_text(OWN.replace("dim = 5120", "dim = 640"))
    store = load_store((catalog,))
    with pytest.raises(CatalogError, match="structure of its own"):
        provide(store.models["mine"], store, BIG)
    assert [file.name for file in order(("mine-Q8_0.gguf",), store, BIG).files] == ["mine-Q8_0.gguf"]
    others = {name: store.models[name] for name in ("mine", "wan2.1-t2v-1.3b")}
    plans, left = provide_all(replace(store, models=others), BIG)
    assert [plan.model.name for plan in plans] == ["wan2.1-t2v-1.3b"] and left[0].startswith("mine has a structure")


# --- `models plan` and `kinema plan` ----------------------------------------------------------------------


@cache
def read(file: CatalogFile, layout: str, folder: Path) -> FileFacts:
    """What a file of full size in the form of this row says of itself."""
    path = folder / f"{file.role}.safetensors"
    write_headers(path, shapes()[layout], file.precision)
    facts = inspect(path)
    path.unlink()
    return facts.model_copy(update={"path": Path(file.place), "files": (Path(file.place),)})


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_both_plans_say_the_same_on_every_card(model: CatalogEntry, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp()
    for tier in TIERS:
        trials = Trials(model, STORE, Card(tier, RAM))
        made = provide(model, STORE, trials.card)
        assert made.bytes and all(file.role != "lora" for file in made.files)
        files = {file.role: file for file in made.files if file.role in model.roles}
        theirs = {role: read(file, layout_name(model, role), folder) for role, file in files.items()}
        # Of the published length nobody made such a file: mixtures differ. Of the same length both have to agree.
        ours = {
            role: header(file.model_copy(update={"bytes": theirs[role].bytes}), layout_of(model, role))
            for role, file in files.items()
        }
        plans = [planned(model, trials, facts) for facts in (theirs, ours)]
        if isinstance(made.trial, MachineError):
            assert made.mode == "too big" and ("--size" in made.notes[-1] or "--frames" in made.notes[-1])
        else:
            assert made.peak_bytes <= tier
        compare(*plans)
    assert made.mode == "resident", "80 GB hold every model"


def layout_of(model: CatalogEntry, role: str) -> Layout:
    return dit_layouts(model)[0] if role in model.dit_roles else load_layouts()[model.part(role)]


def planned(model: CatalogEntry, trials: Trials, files: dict[str, FileFacts]) -> Plan | None:
    request, inputs = trial_request(model, trials.card)
    try:
        return make_plan(request, model, Facts(files=files, media=inputs, machine=trials.machine))
    except MachineError:
        return None


def compare(theirs: Plan | None, ours: Plan | None) -> None:
    """Plain files are the same to the byte; of packed ones a few small matrices may be held otherwise."""
    assert (theirs is None) == (ours is None)
    if theirs is None or ours is None:
        return
    for one, other in zip(theirs.experts.values(), ours.experts.values(), strict=True):
        stay = [len(ref.blocks) if ref.resident_blocks is None else ref.resident_blocks for ref in (one, other)]
        assert abs(stay[0] - stay[1]) <= bool(one.quantisation), stay
        assert one.weight_bytes == pytest.approx(other.weight_bytes, rel=0.02 if one.quantisation else 0)
    peaks = [max(cost.peak_bytes for cost in plan.costs) for plan in (theirs, ours)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.03)


def test_the_layouts_are_those_of_the_models():
    assert record_layouts.LAYOUTS.read_text("utf-8") == record_layouts.text(shapes()), (
        "run: tests/store/record_layouts.py"
    )


def test_every_dit_of_the_catalog_has_a_layout():
    assert all(dit_layouts(model) for model in MODELS)
    assert all(offers(model, STORE) for model in MODELS)
