"""Foreseeing runs on many GPUs: memory, communication, time, failures, and the files that launch them.

Everything here is a model (docs/scaling.md says which, and how it fits what was measured); nothing is run.
"""
