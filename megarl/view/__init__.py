"""What a person sees of a run in a terminal: live lines, progress, tail, trace, summary, tables."""
