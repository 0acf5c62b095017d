"""Language models of OpenVINO with the cache inside the engine: each past input and present output is one variable.

A variable is named by both, as the transformation does it: `past_key_values.0.key` + `present.0.key`. Where the whole
attention of every layer is known (openvino_attention.py), the CPU engine appends to the cache in place, if the cache is
also picked by `beam_idx` [batch] int32, which OpenVINO's own generators feed; rows that stay in place are 0, 1, 2, ...
https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-request/stateful-models.html
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino._offline_transformations import apply_make_stateful_transformation

from deploytool.backends.openvino_attention import fuse_attention
from deploytool.backends.openvino_generate import BEAMS
from deploytool.decoding import PAST, PRESENT, TOKENS, decodes
from deploytool.errors import UsageProblem
from deploytool.signature import Signature


def cache_pairs(signature: Signature) -> dict[str, str]:
    """Present output of each past input; empty where the signature has no cache or gives back less than it takes."""
    if not decodes(signature):
        return {}
    pairs = {name: PRESENT + name.removeprefix(PAST) for name in signature.input_names if name.startswith(PAST)}
    return pairs if set(pairs.values()) <= set(signature.output_names) else {}


def keep_cache(model: ov.Model, signature: Signature, wanted: bool | None) -> dict[str, Any]:
    """Turn the cache into variables in place, unless not `wanted` (None: where there is a cache); says what was done.

    Raises UsageProblem where they are wanted and there is no cache.
    """
    pairs = cache_pairs(signature)
    if wanted and not pairs:
        raise UsageProblem("DT202", "build.stateful must be false or left out for a model without a cache (got true)",
                           detail=[f"a cache is inputs {PAST}N.key and .value and outputs {PRESENT}N.key and .value"],
                           fix="leave it out: models with a cache keep it in the engine then")  # fmt: skip
    if not pairs:
        return {}
    if wanted is False:
        return {"stateful": False, "no_generator": "generate.py runs models that keep their cache: stateful = true"}
    fused = fuse_attention(model, list(pairs))
    if 2 * fused == len(pairs):
        _pick_rows(model, pairs)
    apply_make_stateful_transformation(model, pairs)
    _start_empty(model)
    # OpenVINO rounds caches to 8 bits unless told otherwise; whoever opens the file is told so.
    model.set_rt_info("f32", ["runtime_options", "KV_CACHE_PRECISION"])
    return {"stateful": True, "variables": len(pairs), "attention_fused": fused}


def without_states(model: ov.Model) -> ov.Model:
    """The model with its variables as inputs and outputs again, in place; other models as they are."""
    variables = {node.get_attributes()["variable_id"]: node for node in model.get_ops()
                 if node.get_type_name() == "ReadValue"}  # fmt: skip
    for sink in list(model.get_sinks()):
        variable = sink.get_attributes()["variable_id"]
        past, present = _names(variable)
        read = variables[variable]
        parameter = op.parameter(read.get_output_partial_shape(0), read.get_output_element_type(0), past)
        parameter.output(0).set_names({past})
        readers = [target.get_node() for target in read.output(0).get_target_inputs()]
        picked = [node for node in readers if node.get_type_name() == "Gather"
                  and BEAMS in node.input_value(1).get_names()]  # fmt: skip
        for node in (read, *picked):
            node.output(0).replace(parameter.output(0))
        result = op.result(sink.input_value(0))
        result.input_value(0).add_names({present})
        model.remove_sink(sink)
        model.add_parameters([parameter])
        model.add_results([result])
    for parameter in list(model.get_parameters()):
        if BEAMS in parameter.output(0).get_names():
            model.remove_parameter(parameter)
    return model


def _names(variable: str) -> tuple[str, str]:
    past, _, layer = variable.rpartition(PRESENT)
    return past, PRESENT + layer


def _pick_rows(model: ov.Model, pairs: dict[str, str]) -> None:
    beams = op.parameter([-1], np.int32, BEAMS)
    beams.output(0).set_names({BEAMS})
    for parameter in model.get_parameters():
        if parameter.output(0).get_names() & pairs.keys():
            targets = list(parameter.output(0).get_target_inputs())
            picked = op.gather(parameter.output(0), beams.output(0), op.constant(np.int64(0)))
            for target in targets:
                target.replace_source_output(picked.output(0))
    model.add_parameters([beams])
    model.validate_nodes_and_infer_types()


def _start_empty(model: ov.Model) -> None:
    """A variable that was reset is of length 0 and as many rows as the tokens: else it would have none."""
    rows = op.gather(op.shape_of(model.input(TOKENS), "i64"), op.constant(np.array([0])), op.constant(np.int64(0)))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, *sizes = node.get_output_partial_shape(0)
            rest = np.array([0 if size.is_dynamic else size.get_length() for size in sizes], np.int64)
            shape = op.concat([rows, op.constant(rest)], 0)
            zero = op.constant(np.zeros((), node.get_output_element_type(0).to_dtype()))
            node.set_arguments([op.broadcast(zero, shape).output(0)])
    model.validate_nodes_and_infer_types()
