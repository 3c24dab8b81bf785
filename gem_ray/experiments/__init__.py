"""Named experiments: variants of a recipe, trained over seeds, in one table."""
