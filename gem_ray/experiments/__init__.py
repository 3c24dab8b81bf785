"""Named experiments: variants of the system, compared in one table, with a plot and what a paper published."""
