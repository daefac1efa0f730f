"""`megarl scaling`: studies of many small runs or predictions, described in one YAML file, and the law they follow.

study reads a study, cells measures or predicts one cell and remembers it, law fits, table and plot show, command is the
command line. Called by the command line only. It uses the trainer as the benchmarks do, and the planner.
"""
