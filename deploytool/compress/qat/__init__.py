"""Quantization-aware training: weights and inputs on grids while the model learns."""
