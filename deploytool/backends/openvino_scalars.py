"""Moves operators of one number before the transposes that they follow: the values are the same, in another order.

OpenVINO's CPU plugin does so itself after it has chosen the int8 types, and leaves the transpose with the type from
before. Where it folds a constant next (a lookup in a table of one row, a mask of ones made from sizes), it finds the
type wrong and gives up with "convert->constant_fold". A graph that has nothing left to move does not come there.
"""

from __future__ import annotations

import openvino as ov

_OF_ONE_NUMBER = ("Multiply", "Divide", "Add", "Subtract", "FakeQuantize")


def move_scalars(model: ov.Model) -> int:
    """Put what has single numbers beside its tensor before the transpose that alone it reads, in place; how many.

    It goes on before the reshapes that lead there, next to the product that it can be computed with.
    """
    moved = 0
    for op in model.get_ordered_ops():  # so that a chain moves one after the other
        if op.get_type_name() not in _OF_ONE_NUMBER or not _move(op, ("Transpose",)):
            continue
        moved += 1
        while _move(op, ("Transpose", "Reshape")):
            pass
    model.validate_nodes_and_infer_types()
    return moved


def _move(op: ov.Node, kinds: tuple[str, ...]) -> bool:
    """Swap it with the operator that made its tensor, where that is of the kinds and nothing else reads the tensor."""
    tensors = [i for i, value in enumerate(op.input_values()) if not _is_one_number(value)]
    if len(tensors) != 1:
        return False
    at = tensors[0]
    before = op.input_value(at).get_node()
    if before.get_type_name() not in kinds or len(before.output(0).get_target_inputs()) != 1:
        return False
    rank = before.input_value(0).get_partial_shape().rank
    if rank.is_dynamic or any(len(v.get_shape()) > rank.get_length() for v in op.input_values() if _is_one_number(v)):
        return False
    readers = op.output(0).get_target_inputs()
    op.input(at).replace_source_output(before.input_value(0))
    before.input(0).replace_source_output(op.output(0))
    for reader in readers:
        reader.replace_source_output(before.output(0))
    before.output(0).set_names(op.output(0).get_names())  # the value that had them; outputs are found by them
    op.output(0).set_names(set())
    op.validate_and_infer_types()
    before.validate_and_infer_types()
    return True


def _is_one_number(value: ov.Output) -> bool:
    return value.get_node().get_type_name() == "Constant" and int(value.get_node().data.size) == 1
