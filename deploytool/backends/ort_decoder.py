"""A language model's graph as ONNX Runtime runs it best: fused attention, fused norms, fewer and larger products."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploytool.backends.ort_attention import MICROSOFT, fuse_attention
from deploytool.backends.ort_norms import fuse_norms
from deploytool.backends.ort_packing import pack_products


def fuse_decoder(model: ir.Model) -> dict[str, int]:
    """Rewrite `model` in place and say what was fused; a graph without attention over a cache stays as it is."""
    graph = model.graph
    done = {"attention": fuse_attention(graph)}
    if not done["attention"]:
        return {}
    done["norms"] = fuse_norms(graph)
    passes.RemoveUnusedNodesPass()(model)
    done["products_joined"] = pack_products(graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    model.opset_imports[MICROSOFT] = 1
    graph.opset_imports[MICROSOFT] = 1
    return done
