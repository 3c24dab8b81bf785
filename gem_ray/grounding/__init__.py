"""Matching, tracing and boxes (§3.4)."""
