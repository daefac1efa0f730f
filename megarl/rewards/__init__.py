"""Rewards: graders in killable worker processes; verdicts right | wrong | timeout | error, counted apart.

Files: math (the default grader) · grade (a verdict, and what a grading function may return) · worker (one process) ·
workers (all of them, as `train` uses them). Workers start quickly because nothing here but `workers` imports much.
"""
