"""What a run shows in a terminal: live view, progress, tail, trace, summary, tables."""
