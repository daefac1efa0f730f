"""A run on disk: its directory, lock, atomic checkpoints, timeline, provenance, and trackers elsewhere."""
