"""Formats in: files that hold training data, as lists of rows, and their seeded splits."""

from emloc.data.codespell import codespell_rows
from emloc.data.jsonl import Row, read_rows
from emloc.data.splits import SPLITS, split_rows

__all__ = ["SPLITS", "Row", "codespell_rows", "read_rows", "split_rows"]
