"""One engine a file of tests, over the small models; a file with models of its own names other `settings`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kinema.engine import Engine
from kinema.schema import Settings
from tiny_world import TinyWorld


@pytest.fixture(scope="module")
def settings(tiny_world: TinyWorld) -> Settings:
    return tiny_world.settings


@pytest.fixture(scope="module")
def engine(settings: Settings) -> Iterator[Engine]:
    with Engine(settings) as engine:
        yield engine
