"""How far a student is from its teacher: losses as pure functions of tensors, one file a paper.

All are means over the samples, and 0 where the student's tensor is the teacher's, but for the contrastive one.
"""

from featherweight.matching.attention import attention_map, attention_transfer
from featherweight.matching.contrastive import contrastive
from featherweight.matching.correlation import correlation_congruence
from featherweight.matching.decoupled import decoupled
from featherweight.matching.dist import relation_of_classes
from featherweight.matching.hint import relative_error
from featherweight.matching.overhaul import margin, overhaul
from featherweight.matching.relational import angles, distances
from featherweight.matching.similarity import similarity_preserving
from featherweight.matching.soft_targets import soft_targets
from featherweight.matching.standardized import standardized

__all__ = [
    "angles",
    "attention_map",
    "attention_transfer",
    "contrastive",
    "correlation_congruence",
    "decoupled",
    "distances",
    "margin",
    "overhaul",
    "relation_of_classes",
    "relative_error",
    "similarity_preserving",
    "soft_targets",
    "standardized",
]
