"""Models: blocks of a sequence layer and a channel layer, stacked."""

from memseq.models.classifier import SequenceClassifier
from memseq.models.language_model import LanguageModel

__all__ = ["LanguageModel", "SequenceClassifier"]
