"""People check a sample of a run: which posts, what they corrected, and what it proves of the whole run."""
