"""Whether a launcher such as torchrun or srun started this process."""

from __future__ import annotations

import os


def under_launcher() -> bool:
    """Whether torchrun or srun started this process, as one of several ranks or as the only one."""
    return "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
