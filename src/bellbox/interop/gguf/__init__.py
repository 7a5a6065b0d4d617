"""GGUF files for llama.cpp and its relatives: the weights of a model, and nothing of how it rounds activations.

Needs the extra `gguf`.
"""

from bellbox.interop.gguf.card import card_path, write_card
from bellbox.interop.gguf.export import WEIGHTS_ONLY, GGUFFile, WrittenTensor, export_gguf

__all__ = ["WEIGHTS_ONLY", "GGUFFile", "WrittenTensor", "card_path", "export_gguf", "write_card"]
