"""NaturalQuestions, open (Kwiatkowski et al. 2019; Lee et al. 2019): F1, as arXiv 2510.15103 and 2604.05248 show it."""

from __future__ import annotations

from .closed_book import COLUMNS, KIND, STOP, item, marks, response, select

__all__ = ["COLUMNS", "KIND", "METRICS", "STOP", "item", "marks", "response", "select"]

METRICS = ("f1", "exact_match")
