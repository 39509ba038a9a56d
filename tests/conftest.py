"""Fixtures shared by all tests: small models, written once; no test writes beside them."""

from __future__ import annotations

import pytest

from animate_world import build_animate
from kinema.schema import Settings
from speech_world import build_speech
from tiny_flux import build_flux
from tiny_world import TinyWorld, build


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def flux_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def speech_settings(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_speech(tiny_world, tmp_path_factory.mktemp("speech"))


@pytest.fixture(scope="session")
def animate_settings(tiny_world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return build_animate(tiny_world, tmp_path_factory.mktemp("animate"))
