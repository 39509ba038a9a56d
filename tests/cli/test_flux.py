"""FLUX.1 from the command line, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cli.conftest import Cli
from tiny_world import TinyWorld, picture


@pytest.fixture
def flux(cli: Cli, flux_world: TinyWorld, tiny_world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> Cli:
    import os

    worlds = (flux_world, tiny_world)
    monkeypatch.setenv("KINEMA_MODELS", os.pathsep.join(str(world.root) for world in worlds))
    monkeypatch.setenv("KINEMA_CATALOGS", os.pathsep.join(str(world.settings.catalogs[0]) for world in worlds))
    return cli


def test_pictures_of_a_batch_of_seeds(flux: Cli) -> None:
    ran = flux("generate", "a red cat", "--model", "tiny-schnell", "--seeds", "3,4")
    assert ran.code == 0, ran.err
    assert [Image.open(path).size for path in ran.paths if path.suffix == ".png"] == [(64, 64), (64, 64)]


def test_an_edit_of_two_images(flux: Cli, tmp_path: Path) -> None:
    one, two = picture(tmp_path / "one.png"), picture(tmp_path / "two.png", seed=2)
    words = ("--reference", one, "--reference", two, "--size", "64x64")
    ran = flux("generate", "a red cat", "--model", "tiny-kontext", *words)
    assert ran.code == 0, ran.err


def test_the_plan_names_every_part(flux: Cli) -> None:
    ran = flux("plan", "a red cat", "--model", "tiny-flux")
    assert ran.code == 0, ran.err
    for word in ("flux_dev.safetensors", "tiny_t5", "tiny_clip_l", "tiny_ae", "guidance 3.5", "image"):
        assert word in ran.out, word


def test_a_picture_then_a_video(flux: Cli) -> None:
    words = ("--then", "tiny-clip two small squares --f 5")
    planned = flux("plan", "a red cat", "--model", "tiny-flux", *words)
    assert planned.code == 0 and "tiny-flux" in planned.out and "tiny-clip" in planned.out
    ran = flux("generate", "a red cat", "--model", "tiny-flux", *words)
    assert ran.code == 0, ran.err
    assert [path.suffix for path in ran.paths] == [".png", ".mp4"]
    assert "tiny-clip" in ran.err, "both plans are shown"


def test_inspect_says_what_a_file_is(flux: Cli, flux_world: TinyWorld) -> None:
    ran = flux("inspect", flux_world.file("diffusion_models/flux_schnell.safetensors"))
    assert "FLUX.1 transformer 1 double and 2 single blocks" in ran.out and "no guidance input" in ran.out
