"""Evaluation: scores of a test split → metrics with intervals → comparison."""

from pipeline.evaluation.compare import compare
from pipeline.evaluation.frame import read_scores, write_scores
from pipeline.evaluation.predict import predict, score_table
from pipeline.evaluation.summary import summarize

__all__ = ["compare", "predict", "read_scores", "score_table", "summarize", "write_scores"]
