"""Makes a traced graph small: constants folded, repeats merged, dead nodes gone, batch norms folded into their layer.

The passes are those of onnx-ir and onnxscript; the order and the rule of what may be folded are ours.
"""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from deploytool.lower.onnx_shapes import forget_guesses, simplify_shapes

_SMALL_ELEMENTS = 1024  # constants up to this size are folded always
_RESHAPING = frozenset({"Cast", "Concat", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_BATCH_NORM_RULES = (
    fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule,
)  # fmt: skip
_ROUNDS = 4  # each lets inference see deeper into the graph; transformers need three


def fold(model: ir.Model) -> ir.Model:
    """One round, in place: constants lifted and folded, batch norms fused, shapes inferred, dead nodes gone."""
    _name_transposed(model.graph)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _fuse_batch_norms(model)
    _fold_round(model)
    return model


def tidy(model: ir.Model) -> ir.Model:
    """Make a folded `model` small, in place; inputs, outputs and what it computes stay as they are.

    Outputs must have been declared: their free dimensions have names then, which are found again inside.
    """
    for _ in range(_ROUNDS):
        if not simplify_shapes(model):
            break
        _fold_round(model)
    passes.IdentityEliminationPass()(model)
    _compute_constant_outputs(model.graph)
    passes.OutputFixPass()(model)
    passes.TopologicalSortPass()(model)
    _forget_shapes(model.graph)
    return model


def _fold_round(model: ir.Model) -> None:
    passes.RemoveUnusedNodesPass()(model)
    forget_guesses(model.graph)
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)
    fold_constants(model, onnx_shape_inference=False, input_size_limit=_SMALL_ELEMENTS, should_fold=_may_fold)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _may_fold(node: ir.Node) -> bool | None:
    """True for the rearranging of weights that nothing else reads, so that no weight is stored twice.

    A tied head keeps its Transpose: the embedding reads the same bytes. None leaves the choice to the library, which
    folds what is small.
    """
    if node.op_type not in _RESHAPING:
        return None
    large = [v for v in node.inputs if v is not None and v.const_value is not None
             and v.const_value.size > _SMALL_ELEMENTS]  # fmt: skip
    if not large:
        return None
    return all(_only_rearranged(value) for value in large)


def _only_rearranged(value: ir.Value) -> bool:
    return not value.is_graph_output() and all(
        node.op_type in _RESHAPING and all(v is None or v.const_value is not None for v in node.inputs)
        for node, _ in value.uses()
    )


def _name_transposed(graph: ir.Graph) -> None:
    """Name what Transpose makes of a weight after the weight: the folded constant keeps the name."""
    for node in graph:
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is not None and weight.is_initializer() and not node.outputs[0].is_graph_output():
            node.outputs[0].name = f"{weight.name}.T"


def _compute_constant_outputs(graph: ir.Graph) -> None:
    """Outputs that depend on no input become copies of their constants: not every engine gives an initializer."""
    for index, value in enumerate(graph.outputs):
        if value.is_initializer():
            name = str(value.name)
            value.name = f"{name}_value"
            copy = ir.node("Identity", [value], name=f"{name}_copy")
            copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = name, value.type, value.shape
            graph.append(copy)
            graph.outputs[index] = copy.outputs[0]


def _forget_shapes(graph: ir.Graph) -> None:
    """Inner shapes hold invented names for what is not known, and quantizers stumble over them: engines infer anew."""
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None


def _fuse_batch_norms(model: ir.Model) -> None:
    if any(node.op_type == "BatchNormalization" for node in model.graph):
        rewrite(model, pattern_rewrite_rules=_BATCH_NORM_RULES)
