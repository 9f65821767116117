"""Data sets: from files, generated digits or the caller's tensors to each rank's batches."""
