"""Steps that put weights on a grid, so that engines can store them in few bits."""
