"""How matrices are held: what a plan says of it, what it refuses, and what it counts for memory."""

from __future__ import annotations

import re
from typing import Any

import pytest

from kinema.catalog import load_catalog
from kinema.errors import MachineError, RequestError
from kinema.planning import memory
from kinema.schema import FileFacts, Machine, MediaFacts, Plan
from plan.world import CATALOG, MACHINE, files_of, image, plan, sound, video

MODEL = "wan2.1-t2v-1.3b"
ABLE = MACHINE.model_copy(update={"fp8_matmul": True})


def with_files(machine: Any = MACHINE, **changes: Any) -> dict[str, Any]:
    files: dict[str, FileFacts] = files_of(load_catalog()[MODEL])
    files = {role: file.model_copy(update={"matrix_parameters": file.parameters // 2}) for role, file in files.items()}
    files["dit"] = files["dit"].model_copy(update=changes)
    return {"files": files, "machine": machine}


def notes(made: Plan) -> str:
    return "\n".join(note.text for note in made.notes)


@pytest.mark.parametrize(("how", "bits"), [("fp8", 8), ("fp8-64", 8.5), ("int8", 8)])
def test_rounding_when_loaded_is_counted_and_said(how: str, bits: float) -> None:
    plain = plan(MODEL, facts=with_files()).experts["model"]
    made = plan(MODEL, facts=with_files(), quantise=how)
    ref = made.experts["model"]
    assert (ref.quantisation, ref.packed_parameters) == (how, plain.parameters // 2)
    assert ref.weight_bytes == pytest.approx(plain.parameters / 2 * (bits / 8 + 2))
    assert f"50% of the weights of low.safetensors are rounded to {how}" in notes(made)
    assert made.text_encoder.quantisation == ""
    before, after = (
        {cost.stage: cost.peak_bytes for cost in each.costs} for each in (plan(MODEL, facts=with_files()), made)
    )
    assert after["sample"] < before["sample"]
    assert plan(MODEL, facts=with_files(), quantise_text_encoder=how).text_encoder.quantisation == how


def test_a_quantised_file_is_held_as_it_is_and_never_rounded_again() -> None:
    facts = with_files(quantisation="Q4_K", packed_parameters=1_000_000, packed_bytes=562_500)
    ref = plan(MODEL, facts=facts).experts["model"]
    assert (ref.quantisation, ref.packed_bytes) == ("Q4_K", 562_500)
    assert ref.weight_bytes == 562_500 + 2 * (ref.parameters - 1_000_000)
    with pytest.raises(RequestError, match=r"is quantised already \(Q4_K\)"):
        plan(MODEL, facts=facts, quantise="fp8")


def test_rows_that_hold_no_whole_part_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(RequestError, match="of 64 weights, only of 32") as caught:
        plan(MODEL, facts=with_files(matrix_width=32), quantise="fp8-64")
    assert caught.value.hint == "pass --quantise fp8"
    assert plan(MODEL, facts=with_files(matrix_width=32), quantise="fp8").experts["model"].quantisation == "fp8"


def refused(machine: Machine, **changes: Any) -> list[str]:
    with pytest.raises(MachineError) as caught:
        plan(MODEL, facts=with_files(machine, **changes))
    return [words for words in caught.value.details["fits"] if "--quantise" in words]


def test_int8_is_named_where_the_numbers_that_fp8_multiplies_do_not_fit() -> None:
    def card(memory: float, able: bool) -> Machine:
        update = {"memory_total": int(memory), "memory_free": int(memory), "fp8_matmul": able}
        return MACHINE.model_copy(update=update)

    assert refused(card(22.1e9, able=True)) == ["--quantise int8"]
    assert refused(card(22.1e9, able=False)) == refused(card(22.3e9, able=True)) == ["--quantise fp8"]
    assert plan(MODEL, facts=with_files(card(22.1e9, able=True)), quantise="int8")
    with pytest.raises(MachineError):
        plan(MODEL, facts=with_files(card(22.1e9, able=True)), quantise="fp8")
    assert refused(card(20e9, able=True)) == []


def test_memory_that_runs_out_names_rounding_as_a_refused_plan_does() -> None:
    def fits(card: Machine, **fields: Any) -> list[str]:
        made = plan(MODEL, facts=with_files(MACHINE), **fields)
        return memory.smaller(made, "sample", card)

    card = MACHINE.model_copy(update={"memory_total": 24 * 10**9, "memory_free": 24 * 10**9})
    assert "--quantise fp8 --vram 24.00GB" in fits(card)
    assert plan(MODEL, facts=with_files(card), quantise="fp8")
    assert not any("--quantise" in words for words in fits(card, precision="reference"))
    roomy = card.model_copy(update={"memory_free": 40 * 10**9})
    assert all(re.fullmatch(r"--vram \d+\.\d\dGB", words) for words in fits(roomy, quantise="fp8"))
    (words,) = fits(roomy, quantise="fp8", tile=256, vae_cache="cpu")
    assert words.endswith("GB without --vae-cache, --tile")


@pytest.mark.parametrize(
    ("model", "media"),
    [
        ("wan2.1-vace-14b", {"reference": image(1280, 720)}),
        ("wan2.2-animate-14b", {"reference": image(720, 1280), "pose": video(1280, 720, 400, 30),
                                "face": video(512, 512, 400, 30)}),
        ("wan2.2-s2v-14b", {"reference": image(1280, 720), "audio": sound(30.0)}),
    ],
)  # fmt: skip
def test_the_size_that_is_named_is_the_largest_that_fits(model: str, media: dict[str, MediaFacts]) -> None:
    """Of latents that hold more than the video's frames, or a clip of them."""
    files = {role: one.model_copy(update={"blocks": (345_000_000,) * 40}) if "dit" in one.component else one
             for role, one in files_of(CATALOG[model]).items()}  # fmt: skip
    facts = {"files": files, "machine": MACHINE.model_copy(update={"memory_free": 8 * 10**9})}
    with pytest.raises(MachineError) as caught:
        plan(model, media, facts=facts)
    (named,) = (words.split()[1] for words in caught.value.details["fits"] if "--size" in words)
    assert plan(model, media, facts=facts, size=named)
    width, height = (int(side) for side in named.split("x"))
    step = 64 if "s2v" in model else 16
    with pytest.raises(MachineError):
        plan(model, media, facts=facts, size=f"{width + 2 * step}x{height + 2 * step}")


def test_where_the_host_is_short_it_is_the_host_that_is_named() -> None:
    machine = MACHINE.model_copy(update={"memory_free": 10**10, "ram_free": 10**9})
    with pytest.raises(MachineError, match=r"the host has 1\.0 GB"):
        plan(MODEL, facts=with_files(machine))


def test_a_file_that_is_quantised_is_not_told_to_be_rounded() -> None:
    small = MACHINE.model_copy(update={"memory_total": 24 * 10**9, "memory_free": 24 * 10**9})
    assert refused(small) == ["--quantise fp8"]
    assert refused(small, quantisation="Q8_0") == []


def test_plain_fp8_is_warned_of() -> None:
    assert "rounded to fp8 as well" in notes(plan(MODEL, facts=with_files(quantisation="fp8_e4m3 plain")))
    assert "fp8" not in notes(plan(MODEL, facts=with_files(quantisation="fp8_e4m3, a scale per tensor")))


@pytest.mark.parametrize(
    ("held", "multiplied"),
    [
        ("fp8_e4m3, a scale per tensor", True),
        ("fp8_e4m3, a scale per channel", True),
        ("fp8_e4m3 plain", True),
        ("fp8_e5m2 plain", False),
        ("fp8_e4m3, a scale per 64 weights", False),
        ("fp8_e4m3, a scale per tensor, weight only", False),
        ("fp8_e4m3, a scale per tensor, weight only + fp8_e4m3, a scale per tensor", True),
        ("fp8_e4m3 plain + fp8_e4m3, a scale per 64 weights", True),
        ("int8, a scale per channel", False),
        ("Q8_0", False),
        ("", False),
    ],
)
def test_fp8_is_multiplied_where_the_card_can(held: str, multiplied: bool) -> None:
    made = plan(MODEL, facts=with_files(ABLE, quantisation=held))
    assert made.experts["model"].fp8_matmul is multiplied
    assert ("multiplied as they are" in notes(made)) is multiplied
    assert not plan(MODEL, facts=with_files(quantisation=held)).experts["model"].fp8_matmul
    assert not plan(MODEL, facts=with_files(ABLE, quantisation=held), fp8_matmul=False).experts["model"].fp8_matmul
    exact = plan(MODEL, facts=with_files(ABLE, quantisation=held), precision="reference")
    assert not exact.experts["model"].fp8_matmul


def test_fp8_multiplication_asked_for_in_vain_is_refused() -> None:
    with pytest.raises(MachineError, match="Card does not multiply fp8 numbers"):
        plan(MODEL, facts=with_files(), quantise="fp8", fp8_matmul=True)
    with pytest.raises(RequestError, match=r"holds no fp8 e4m3 matrices .*, but bfloat16"):
        plan(MODEL, facts=with_files(ABLE), fp8_matmul=True)
    held = "fp8_e4m3, a scale per tensor, weight only"
    assert "are to be unpacked" in notes(plan(MODEL, facts=with_files(ABLE, quantisation=held)))
    assert "unpacked" not in notes(plan(MODEL, facts=with_files(quantisation=held)))
    with pytest.raises(RequestError, match="weight only") as caught:
        plan(MODEL, facts=with_files(ABLE, quantisation=held), fp8_matmul=True)
    assert "--to fp8_channel" in caught.value.hint
    assert plan(MODEL, facts=with_files(ABLE), quantise="fp8", fp8_matmul=True).experts["model"].fp8_matmul
