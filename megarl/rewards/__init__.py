"""Rewards: graders in killable worker processes; verdicts right | wrong | timeout | error, counted apart."""
