"""Captions and auxiliary knowledge (§3.2.1)."""
