"""Folders on disk: packed models, binarized ones, and whatever else a MODEL argument names."""
