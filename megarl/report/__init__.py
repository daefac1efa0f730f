"""One self-contained HTML page of a run, or of several side by side: `megarl report RUN [RUN2 …]`.

run.py reads run directories, rollouts.py chooses and packs what the models wrote, page.py puts the page together from
page.html, style.css and the scripts. Called by the command line and by launch.py; imports nothing above `rollout`.
"""

from megarl.report.page import at_end, write

__all__ = ["at_end", "write"]
