"""From rows to batches: records of files, training sets, the texts of every step, and the tasks that score."""
