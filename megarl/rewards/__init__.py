"""Rewards: graders in worker processes that can be killed. Verdicts are right | wrong | timeout | error.

Files: math (the default grader) · grade (one verdict, and what a grading function may return) · worker (one process) ·
workers (all of them) · processes (ends what graders start) · grading (the grades of one rollout). A worker starts
quickly: of megarl it imports only `grade`, `processes` and the grading function.
"""
