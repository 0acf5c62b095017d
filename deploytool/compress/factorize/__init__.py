"""Steps that replace a layer by a cheaper product of layers."""
