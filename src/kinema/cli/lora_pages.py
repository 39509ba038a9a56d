"""What a LoRA file is, as text for people and as data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kinema.catalog.loras import known_lora, load_loras
from kinema.cli.tell import gigabytes
from kinema.lora import LoraRef, Unmatched
from kinema.weights.lora.file import LoraFile, read_lora
from kinema.weights.lora.match import lora_facts
from kinema.weights.lora.weights import Weights, fit, sizes, unexplained

SHOWN = 10
"""Names of unmatched parts that are listed."""


def described(path: Path, weights: Weights | None) -> tuple[str, dict[str, Any]]:
    """Return what a LoRA is, as text and as data; with a model also how it fits."""
    lora = read_lora(path)
    facts = fit(path, weights) if weights else lora_facts(lora, {})
    known = known_lora(facts.files[0])
    scales = sorted({round(lora.scale(change), 6) for change in lora.changes})
    rows: dict[str, str] = {
        "names": f"{facts.dialect}, for {facts.family.title() if facts.family == 'wan' else 'FLUX'}",
        "kinds": ", ".join(f"{count} {name}" for name, count in facts.algorithms.items()),
        "rank": _range(facts.ranks),
        "scale": _range(scales),
        "changes": f"{len(lora.changes)} parameters: {_summary(lora)}",
        "size": gigabytes(facts.bytes),
        "expert": f"{facts.name_suggests}-noise, by its name only" if facts.name_suggests else "",
        "published": load_loras()[known].title if known else "",
        "unread": "; ".join(f"{name}: {why}" for name, why in list(lora.leftover.items())[:SHOWN]),
    }
    data = {"path": str(path), **facts.model_dump(mode="json"), "known": known, "scales": scales}
    if weights is not None:
        rows |= _fit_rows(facts.matches["dit"].unmatched, len(facts.matches["dit"].targets), facts.total, weights)
        if facts.matches["dit"].targets:
            data["change"] = sizes(LoraRef(path=path), weights)
            rows["change"] = f"{data['change']:.3%} of the norm of the weights it changes, at strength 1"
    return "\n".join([str(path), *(f"  {name:<10} {text}" for name, text in rows.items() if text)]), data


def _fit_rows(unmatched: Sequence[Unmatched], matched: int, total: int, weights: Weights) -> dict[str, str]:
    lost = unexplained(unmatched)
    rows = {"on": f"{weights.path} ({weights.facts.structure})", "matched": f"{matched} of {total}"}
    if len(lost) < len(unmatched):
        rows["left out"] = f"{len(unmatched) - len(lost)} of the image branch of Wan 2.1, which this model lacks"
    names = "; ".join(f"{item.name}: {item.why}" for item in lost[:SHOWN])
    return rows | ({"unmatched": f"{len(lost)}: {names}{'; ...' if len(lost) > SHOWN else ''}"} if lost else {})


def _summary(lora: LoraFile) -> str:
    counts: dict[str, int] = {}
    for change in lora.changes:
        parts = [part for part in change.target.split(".") if not part.isdigit()]
        name = ".".join(parts[:2]) if parts[0].endswith("blocks") else parts[0]
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _range(values: Sequence[float]) -> str:
    return "" if not values else f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"
