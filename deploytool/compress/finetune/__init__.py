"""Training with the model's own loss."""
