"""Distillation: a student trained on what a teacher answers, and not on labels alone."""

from featherweight.distill.born_again import BornAgain
from featherweight.distill.distillation import Distillation
from featherweight.distill.feature import Feature
from featherweight.distill.mutual import Mutual
from featherweight.distill.relation import Relation
from featherweight.distill.response import Response
from featherweight.distill.self_distill import SelfDistill
from featherweight.distill.together import Together

__all__ = ["BornAgain", "Distillation", "Feature", "Mutual", "Relation", "Response", "SelfDistill", "Together"]
