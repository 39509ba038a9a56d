"""The error of every format against float32 on the same trained weights, printed; the documents carry these numbers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quantised-files.md"
SCRIPT = ROOT / "bench" / "quantisation.py"
LINE = re.compile(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+)% \| ([\d.]+)% \|$", re.M)


def test_the_page_has_the_error_of_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("quantisation", SCRIPT)
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "quantisation", bench)
    spec.loader.exec_module(bench)
    rows = bench.table()
    print("\n" + "\n".join(row.text for row in rows))
    carried = {name: (float(weights), float(velocity)) for name, _, weights, velocity in LINE.findall(PAGE.read_text())}
    assert list(carried) == [row.name for row in rows], "run: python bench/quantisation.py"
    for row in rows:
        weights, velocity = carried[row.name]
        # Another CPU rounds sums another way: a tenth of the number, or one hundredth of a percent.
        assert 100 * row.weights == pytest.approx(weights, rel=0.02, abs=0.01), row.text
        assert 100 * row.velocity == pytest.approx(velocity, rel=0.1, abs=0.01), row.text
    errors = {row.name.split(" *")[0]: row.weights for row in rows}
    order = ["GGUF Q8_0", "GGUF Q6_K", "GGUF Q5_0", "GGUF Q4_0", "GGUF Q3_K", "GGUF Q2_K"]
    assert [errors[name] for name in order] == sorted(errors[name] for name in order)
