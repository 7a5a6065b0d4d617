"""Bellbox models in other people's programs: one part a program, imported where it is used.

Each part needs an extra of its own and says which one where it is missing. A program that cannot represent the
function gets a refusal, or "weights only" in so many words; never something that computes another thing.
"""
