"""Backends: a folder each, found by `bellbox.ops.dispatch.load_backends`, registering itself."""
