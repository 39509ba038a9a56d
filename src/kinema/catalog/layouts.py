"""What the header of a published file says, before the file is here: the structure of its model, the sizes of its row.

Owns layouts.toml, which tests/store/record_layouts.py counts on the models themselves. Pure arithmetic: what planning
says of such a file, it says of the real one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

from kinema.catalog.choice import kind
from kinema.catalog.files import CatalogFile
from kinema.catalog.table import read_shipped
from kinema.schema import CatalogEntry, Component, FileFacts, Frozen

DTYPES = {"16": "float16", "32": "float32"}
HELD = {
    "fp8_scaled": "fp8_e4m3, a scale per tensor", "fp8_e5m2_scaled": "fp8_e5m2, a scale per tensor",
    "fp8": "fp8_e4m3 plain", "int8": "int8, a scale per channel",
}  # fmt: skip
"""Precisions of a byte a weight -> how `inspect` describes them."""


class Layout(Frozen):
    """The structure of a DiT or a part, as `inspect` reads it from a 16-bit file.

    other_parameters   those of tensors that are no matrices: convolutions, norms, biases.
    blocks             (how many, parameters of each), in order.
    """

    component: Component
    parameters: int
    tensors: int
    float32_parameters: int
    matrix_parameters: int
    other_parameters: int
    blocks: tuple[tuple[int, int], ...]
    config: dict[str, Any]


@cache
def load_layouts() -> dict[str, Layout]:
    """Return the layouts of all parts, and of all DiTs that differ in structure."""
    return {name: Layout.model_validate(row) for name, row in read_shipped("layouts.toml").items()}


def dit_layouts(model: CatalogEntry) -> list[Layout]:
    """Return the layouts a DiT of this model may have: two where an adapter is optional, none of an unknown kind."""
    component: Literal["flux_dit", "dit"] = "flux_dit" if model.family == "flux" else "dit"
    known = (layout for layout in load_layouts().values() if layout.component == component)
    return [layout for layout in known if model.misfit(layout.config) is None]


def header(file: CatalogFile, layout: Layout) -> FileFacts:
    """Return what `inspect` would say of a file of this layout. Its packed weights are estimated from its length."""
    precision, size = kind(file.precision), file.bytes or 0
    packed = 0 if precision in ("16-bit", None) else layout.matrix_parameters
    if packed and precision not in ("fp8_scaled", "int8"):  # everything is: the table of a text encoder too
        packed += layout.config.get("vocab", 0) * layout.config["dim"]
    share = packed
    if packed and precision not in HELD:  # GGUF packs every matrix, and nothing else
        matrices = layout.parameters - layout.other_parameters
        share = round((size - 2 * layout.other_parameters) * packed / matrices)
    path = Path(file.place)
    return FileFacts(
        path=path,
        files=(path,),
        bytes=size,
        container="gguf" if path.suffix == ".gguf" else "safetensors",
        component=layout.component,
        dialect="as published",
        dtype="bfloat16" if "b" in file.precision else DTYPES.get(file.precision[-2:], "bfloat16"),
        tensors=layout.tensors,
        parameters=layout.parameters,
        config=layout.config,
        quantisation=HELD.get(precision or "", file.precision) if packed else "",
        packed_parameters=packed,
        packed_bytes=share,
        matrix_parameters=layout.matrix_parameters,
        structure=f"{layout.component} of the catalog",
        blocks=tuple(parameters for count, parameters in layout.blocks for _ in range(count)),
        float32_parameters=layout.float32_parameters,
    )
