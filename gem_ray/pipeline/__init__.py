"""The components on Ray Data."""
