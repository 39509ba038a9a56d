"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest

from tiny_world import TinyWorld, build


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return build(tmp_path_factory.mktemp("models"))
