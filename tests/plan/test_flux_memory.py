"""FLUX.1 dev of the published size on every card of the menu: headers only, planned within its memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from checkpoints import manifest, write_sparse
from kinema.schema import FileFacts
from kinema.weights.detect import inspect
from plan.world import plan

FILES = {
    "dit": ("flux1_dev", "BF16"), "vae": ("flux1_ae", "F32"), "text_encoder": ("t5xxl_encoder_transformers", "F16"),
    "clip_text": ("clip_l_transformers", "F16"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileFacts]:
    folder = tmp_path_factory.mktemp("flux")
    return {
        role: inspect(write_sparse(folder / f"{role}.safetensors", manifest(name), dtype))
        for role, (name, dtype) in FILES.items()
    }


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 32, 48, 80])
def test_every_card_has_a_plan(files: dict[str, FileFacts], gigabytes: int) -> None:
    made = plan("flux.1-dev", facts={"files": files}, vram=f"{gigabytes}GB", ram="32GB")
    assert max(cost.peak_bytes for cost in made.costs) < gigabytes * 1e9
    assert max(cost.host_bytes for cost in made.costs) < 32e9
    resident = made.experts["model"].resident_blocks
    assert (resident is None) == (gigabytes >= 32)


def test_more_memory_keeps_more_blocks(files: dict[str, FileFacts]) -> None:
    kept = [
        plan("flux.1-dev", facts={"files": files}, vram=f"{gigabytes}GB", ram="32GB").experts["model"].resident_blocks
        for gigabytes in (8, 12, 16, 24)
    ]
    assert kept == sorted(set(kept)) and kept[0] > 0


def test_the_page_says_what_the_plan_does(files: dict[str, FileFacts]) -> None:
    page = (Path(__file__).parents[2] / "docs/flux.md").read_text("utf-8")
    rows = re.findall(r"\| (\d+) GB \| (\w+) \| (\w+) \| ([\d.]+) GB \|", page)
    assert len(rows) == 5
    for card, stay, t5, peak in rows:
        made = plan("flux.1-dev", facts={"files": files}, vram=f"{card}GB", ram="32GB")
        resident = made.experts["model"].resident_blocks
        assert stay == ("all" if resident is None else str(resident)), card
        assert t5 == ("whole" if made.text_encoder.resident_blocks is None else "streamed"), card
        assert f"{max(cost.peak_bytes for cost in made.costs) / 1e9:.1f}" == peak, card
