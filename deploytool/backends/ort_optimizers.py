"""Names of the optimizers of ONNX Runtime that a session can do without. Light: nothing heavy is imported here.

A session takes any name and passes over those that it does not know. Those that it names itself when it opens a graph
with its log on, and the rules that it counts as one there: GenerateRewriteRules in
https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/graph_transformer_utils.cc
"""

from __future__ import annotations

RULES = frozenset({
    "CastChainElimination", "CastElimination", "ClipQuantRewrite", "ConvAddFusion", "ConvBNFusion", "ConvMulFusion",
    "DivMulFusion", "EliminateDropout", "EliminateIdentity", "EliminateSlice", "ExpandElimination", "FuseReluClip",
    "GemmSumFusion", "GemmTransposeFusion", "LabelEncoderFusion", "MatMul_BatchNormalization_Fusion", "NoopElimination",
    "NotWhereFusion", "Pad_Fusion", "PreShapeNodeElimination", "ReluQuantRewrite", "UnsqueezeElimination",
})  # fmt: skip
TRANSFORMERS = frozenset({
    "AttentionFusion", "Avx2WeightS8ToU8Transformer", "BiasDropoutFusion", "BiasGeluFusion", "BiasSkipLayerNormFusion",
    "BiasSoftmaxFusion", "CommonSubexpressionElimination", "ConstantFolding", "ConstantSharing",
    "ConvActivationFusion", "ConvAddActivationFusion", "DoubleQDQPairsRemover", "DQMatMulNBitsFusion",
    "DynamicQuantizeMatMulFusion", "EmbedLayerNormFusion", "FastGeluFusion", "GatherSliceToSplitFusion",
    "GatherToSliceFusion", "GeluApproximation", "GeluFusionL1", "GeluFusionL2", "GemmActivationFusion",
    "GroupQueryAttentionFusion", "GroupQueryAttentionPreNormFusion", "LayerNormFusionL1", "LayerNormFusionL2",
    "Level1_RuleBasedTransformer", "Level2_RuleBasedTransformer", "MatMulActivationFusion", "MatMulAddFusion",
    "MatMulIntegerToFloatFusion", "MatMulNBitsFusion", "MatMulNBitsMlpFusion", "MatMulNBitsQkvFusion",
    "MatMulScaleFusion", "MatmulTransposeFusion", "NchwcTransformer", "NhwcTransformer", "QDQFinalCleanupTransformer",
    "QDQPropagationTransformer", "QDQS8ToU8Transformer", "QDQSelectorActionTransformer", "QuickGeluFusion",
    "ReshapeFusion", "SimplifiedLayerNormFusion", "SkipLayerNormFusion", "SliceConcatToSpaceToDepthFusion",
    "TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider", "WeightBiasQuantization", "WhereDummyDq",
})  # fmt: skip
NAMES = RULES | TRANSFORMERS
