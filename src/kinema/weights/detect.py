"""What a checkpoint is, from its header alone.

Structure comes from names and shapes. Role (which expert) is in no file: names only suggest it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import nn

from kinema.schema import Component, FileFacts
from kinema.weights.keys import Translation, components_of, translate
from kinema.weights.quantised.layers import packable
from kinema.weights.quantised.schemes import describe, open_weights
from kinema.weights.quantised.stored import StoredPacked
from kinema.weights.structure import DESCRIBE, MODELS, Shapes, build_for


def inspect(path: Path | str | Sequence[Path], component: Component | None = None) -> FileFacts:
    """Return what a checkpoint (file, folder, index or shards) is; of an all-in-one file, what its `component` is.

    Reads headers only.

    Raises CheckpointError for a file that is damaged, quantised in an unknown way, another model, or not exactly a
    model that is known.
    """
    file = open_weights(path)
    translation = translate(file, component)
    component, shapes = translation.dialect.component, Shapes(translation)
    config = MODELS[component].config(shapes)
    module = build_for(shapes, config)
    packed = _packed(translation, module)
    matrices = [leaf for _, leaf in packable(component, module) if isinstance(leaf, nn.Linear)]
    blocks, float32_parameters = _sizes(module, component)
    return FileFacts(
        path=file.path,
        files=file.files,
        bytes=file.bytes,
        container=file.container,
        component=component,
        dialect=translation.dialect.name,
        dtype=_main_dtype(translation),
        tensors=len(shapes.table),
        parameters=sum(math.prod(shape) for shape in shapes.table.values()),
        config=config,
        quantisation=describe(file, translation.names),
        packed_parameters=sum(math.prod(tensor.shape) for tensor in packed),
        packed_bytes=sum(tensor.bytes for tensor in packed),
        matrix_parameters=sum(leaf.weight.numel() for leaf in matrices),
        matrix_width=math.gcd(*(leaf.in_features for leaf in matrices)),
        structure=DESCRIBE[component](config),
        ignored=tuple(
            names[0] if len(names) == 1 else f"{pattern} ({len(names)} tensors)"
            for pattern, names in translation.ignored.items()
        ),
        has_tokenizer="spiece_model" in file or file.tokenizer is not None,
        name_suggests=name_suggests(file.path) if component == "dit" else None,
        blocks=blocks,
        float32_parameters=float32_parameters,
    )


def components_in(path: Path | str | Sequence[Path]) -> tuple[Component, ...]:
    """Return the components a checkpoint holds: several of an all-in-one file, none of one that is not known."""
    return components_of(open_weights(path))


def _sizes(module: nn.Module, component: Component) -> tuple[tuple[int, ...], int]:
    """Return parameters of each block with what runs with it, and of the rest those that stay float32."""
    groups: list[list[nn.Module]] = module.block_groups() if hasattr(module, "block_groups") else []  # type: ignore[operator]
    within = [{id(t): t for part in group for t in part.state_dict(keep_vars=True).values()} for group in groups]
    inside = {number for group in within for number in group}
    keeps = MODELS[component].stays_float32
    outside = (
        tensor.numel()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if keeps(name) and id(tensor) not in inside
    )
    return tuple(sum(tensor.numel() for tensor in group.values()) for group in within), sum(outside)


def name_suggests(path: Path) -> Literal["high", "low"] | None:
    """Return which expert the file's or folder's name hints at: a hint, for publishers differ, never a decision."""
    for name in (path.name, path.parent.name):
        found = {word.lower() for word in re.findall(r"(?i)(?<![a-z])(high|low)(?:[-_. ]?noise)?(?![a-z])", name)}
        if found:
            return None if len(found) > 1 else "high" if found == {"high"} else "low"
    folder = path if path.is_dir() else path.parent
    if folder.name == "transformer" and (folder.parent / "transformer_2").is_dir():
        return "high"
    return "low" if folder.name == "transformer_2" else None


def _main_dtype(translation: Translation) -> str:
    """The dtype of most parameters."""
    weight: Counter[str] = Counter()
    for name in translation.names:
        weight[translation.file.kind(name)] += math.prod(translation.file.shape(name))
    return weight.most_common(1)[0][0]


def _packed(translation: Translation, module: nn.Module) -> list[StoredPacked]:
    """What of a file stays packed when it is loaded."""
    stored, found = translation.file.stored(), []
    for name, _ in packable(translation.dialect.component, module):
        if translation.stays_packed(name):
            tensor = stored[translation.sources[name].names[0]]
            assert isinstance(tensor, StoredPacked)
            found.append(tensor)
    return found
