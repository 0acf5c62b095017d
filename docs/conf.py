"""Sphinx's settings; the build must be free of warnings (`sphinx-build -W`)."""

project = "deploytool"
copyright = "2026, the deploytool authors"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
