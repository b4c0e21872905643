"""Evaluation: captions of a split, their metrics, tables and reports."""
