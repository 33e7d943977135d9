"""Benchmarks that `python -m labutils bench NAME` runs, each a table for people and one JSON object per row."""
