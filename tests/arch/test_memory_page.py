"""The tables of docs/memory.md: they are what plans of full-size models say today, and what those say can be true."""

from __future__ import annotations

import importlib.util
import itertools
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kinema.errors import MachineError

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_memory_page", DOCS / "make_memory_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def answers(script: ModuleType, folder: Path) -> dict[tuple[str, str, int], Any]:
    found: dict[tuple[str, str, int], Any] = script.answers(folder)
    return found


def test_the_tables_are_those_of_the_plans(script: ModuleType, answers: dict[Any, Any]) -> None:
    page = script.PAGE.read_text()
    assert page[page.index(script.MARK) :] == script.tables(answers), "run: .venv/bin/python docs/make_memory_page.py"
    assert page.count("GB |") >= len(script.ROWS) * len(script.CARDS)


def test_every_plan_stays_within_its_card_and_the_host(answers: dict[Any, Any]) -> None:
    for (model, size, card), plan in answers.items():
        if not isinstance(plan, MachineError):
            assert max(cost.peak_bytes for cost in plan.costs) <= 0.95 * (card * 1e9 - 6e8), (model, size, card)
            assert max(cost.host_bytes for cost in plan.costs) <= 60e9, (model, size, card)


def test_a_larger_card_never_keeps_less(script: ModuleType, answers: dict[Any, Any]) -> None:
    def kept(answer: Any) -> float:
        if isinstance(answer, MachineError):
            return -1
        resident = next(iter(answer.experts.values())).resident_blocks
        return 1000 if resident is None else resident

    for model, (_, sizes, _) in script.ROWS.items():
        for size in sizes:
            counts = [kept(answers[model, size, card]) for card in script.CARDS]
            assert all(small <= large for small, large in itertools.pairwise(counts)), (model, size, counts)


def test_what_a_refusal_names_does_fit(script: ModuleType, folder: Path, answers: dict[Any, Any]) -> None:
    refused = {key: answer for key, answer in answers.items() if isinstance(answer, MachineError)}
    assert refused, "nothing is refused: this checks nothing"
    for (model, size, card), error in refused.items():
        assert error.details["fits"], (model, size, card)
        for words in error.details["fits"]:
            flags = {flag.replace("-", "_"): value for flag, value in re.findall(r"--([\w-]+) (\S+)", words)}
            assert script.plan_on(script.request_of(model, **{"size": size, **flags}), card, folder)


OWN = {"text_encoder_on": "device"}
WHOLE = {**OWN, "blocks_to_swap": 0}


@pytest.mark.parametrize(
    ("model", "card", "fields", "rounded"),
    [
        ("wan2.2-animate-14b", 8, {"size": "832x480"}, "--quantise fp8"),
        ("flux.1-dev", 16, WHOLE, "--quantise fp8"),
        ("flux.1-dev", 8, OWN, "--quantise-text-encoder fp8"),
        ("wan2.2-ti2v-5b", 10, WHOLE, "--quantise fp8 --quantise-text-encoder fp8"),
        ("flux.1-dev", 8, WHOLE, None),
        ("wan2.2-animate-14b", 8, {"size": "832x480", "precision": "reference"}, None),
    ],
)
def test_rounding_is_named_where_it_is_enough_and_no_more_of_it(
    script: ModuleType, folder: Path, model: str, card: int, fields: dict[str, Any], rounded: str | None
) -> None:
    with pytest.raises(MachineError) as caught:
        script.plan_on(script.request_of(model, **fields), card, folder)
    named = [words for words in caught.value.details["fits"] if "--quantise" in words]
    assert named == ([rounded] if rounded else [])
    if rounded:
        flags = {flag.replace("-", "_"): kind for flag, kind in re.findall(r"--([\w-]+) (\S+)", rounded)}
        assert script.plan_on(script.request_of(model, **fields, **flags), card, folder)
