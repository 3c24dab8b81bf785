"""Work on a Ray cluster besides annotating: submitted jobs, and training on workers."""
