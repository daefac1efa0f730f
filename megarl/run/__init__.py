"""A run on disk: its directory, lock, checkpoints, timeline and provenance; and trackers, which copy its metrics."""
