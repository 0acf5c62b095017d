"""Round to nearest: every weight goes to the nearest value of its grid. The plain way that others are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deploytool.compress.matrices import matrix
from deploytool.compress.quantize.found import find_grid
from deploytool.compress.quantize.layers import chosen_layers, group_of, put_on, refuse_none, shrinks_of, weight_name
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.tables import Rtn
from deploytool.compress.step import Context
from deploytool.encoding import Encoding
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source


def apply(
    source: Source, settings: Rtn, context: Context, *, bits: Mapping[str, int] | None = None
) -> tuple[Source, dict[str, Any]]:
    """Round the chosen layers of a copy; `bits` has the widths of layers that do not get `settings.bits`."""
    module = shell(source.module)
    picked, skipped = chosen_layers(module, settings)
    encodings = dict(source.encodings)
    layers = []
    for name, layer in picked.items():
        width = (bits or {}).get(name, settings.bits)
        encoding = _encoding(matrix(layer), settings.model_copy(update={"bits": width}))
        if encoding is None:
            skipped.append({"layer": name, "reason": f"its weight lies on no grid of {settings.bits} bits"})
            continue
        layers.append({"layer": name, **put_on(layer, encoding)})
        encodings[weight_name(name)] = encoding
    refuse_none("rtn", layers, skipped)
    context.progress(f"rtn: {len(layers)} layers on grids of {sorted({entry['bits'] for entry in layers})} bits")
    return with_module(source, module, encodings=encodings), {"layers": layers, "skipped": skipped}


def _encoding(weight: Tensor, settings: Rtn) -> Encoding | None:
    if settings.group == "found":
        return find_grid(weight, settings.bits)
    return choose(weight, settings.bits, group_of(weight, settings.group), settings.symmetric,
                  shrinks=shrinks_of(settings))  # fmt: skip
