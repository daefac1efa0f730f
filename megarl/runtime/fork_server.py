"""Imported by the process that ranks are forked from: it ends with the process that started it.

`spawn` names that process in an environment variable. In any other process this module does nothing.
"""

from __future__ import annotations

import os

from megarl.runtime.tether import die_with_parent

STARTER = "MEGARL_FORK_SERVER_OF"

if starter := os.environ.pop(STARTER, ""):
    die_with_parent(int(starter))
