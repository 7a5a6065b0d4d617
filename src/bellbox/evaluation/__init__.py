"""Quality of a model: perplexity with its protocol, bits per byte, and the unigram floor beside them."""

from bellbox.evaluation.perplexity import PerplexityResult, perplexity
from bellbox.evaluation.unigram import UnigramResult, unigram

__all__ = ["PerplexityResult", "UnigramResult", "perplexity", "unigram"]
