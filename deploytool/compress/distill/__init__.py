"""Steps that train the compressed model towards the original one."""
