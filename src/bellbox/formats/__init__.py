"""Folders on disk: packed models, binarized ones, and whatever else a MODEL argument names."""

BINARIZED = "bellbox-binarized"
"""`format` in the `config.json` of a binarized folder, known without importing what reads one."""
