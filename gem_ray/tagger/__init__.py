"""The dual-path CRF tagger (§3.2)."""
