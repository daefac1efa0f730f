"""Scaling studies: many small runs or predictions described in one YAML file, and the law through their results.

study.py reads a study, cells.py measures or predicts one cell and remembers it, law.py fits, table.py and plot.py show.
Called by tools/scaling.py; uses the trainer as the benchmarks do, and the planner.
"""
