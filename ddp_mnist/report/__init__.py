"""Pictures, page and comparison of runs."""
