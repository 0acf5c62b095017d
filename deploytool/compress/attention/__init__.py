"""Steps that replace a model's attention."""
