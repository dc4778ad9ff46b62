"""Scoring: what the teacher, and the writing snapshot, say of each rollout."""

from npd.score.base import Scorer, build_scorer

__all__ = ["Scorer", "build_scorer"]
