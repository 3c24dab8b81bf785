"""Scores, tables and the gallery."""
