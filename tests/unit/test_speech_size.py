"""The size of a speech-driven video: what the official scan gives, recorded from it."""

from __future__ import annotations

import pytest

from kinema.planning.geometry import size_by_area_speech

# (width, height, area) -> size. Source: Wan-Video/Wan2.2 wan/speech2video.py get_size_less_than_area, run on them.
OFFICIAL = {
    (1200, 1600, 1024 * 704): (704, 960),
    (1920, 1080, 1024 * 704): (1088, 640),
    (640, 480, 1024 * 704): (640, 512),
    (300, 900, 832 * 480): (320, 960),
    (4000, 3000, 1280 * 720): (1088, 832),
    (96, 80, 64 * 64): (64, 64),
}


@pytest.mark.parametrize("given", OFFICIAL)
def test_sizes_are_the_official_ones(given: tuple[int, int, int]):
    assert size_by_area_speech(*given) == OFFICIAL[given]


@pytest.mark.parametrize("width", range(100, 3000, 357))
@pytest.mark.parametrize("height", range(100, 3000, 411))
def test_every_size_divides_and_fits(width: int, height: int):
    area = 1024 * 704
    wide, tall = size_by_area_speech(width, height, area)
    assert wide % 64 == tall % 64 == 0 < wide * tall <= area
