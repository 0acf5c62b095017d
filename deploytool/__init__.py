"""deploytool: a trained PyTorch model to a verified, measured, packaged artifact for a device."""

__version__ = "0.1.0"
