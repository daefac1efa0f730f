"""Submits `SIZE=tiny sbatch slurm/train_qwen3_32b.sh` to the tests' Slurm and reads what became of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from megarl.data.ledger import Ledger
from tests.support.cluster import Cluster, wait_for

ROOT = Path(__file__).parents[2]
SCRIPT = "slurm/train_qwen3_32b.sh"
DEADLINE = 1200.0  # seconds for a job to come as far as a test waits for; a quiet machine needs a twentieth
IDLE_DEADLINE = 90  # seconds after which an engine ends that nobody talks to; a learner is there sooner
# What depends on when requests reached the engine (log-probs to rounding, in another batch) or on the clock.
UNEQUAL = ("seconds", "mismatch", "canary", "probe_calibration", "memory")


class Job:
    """One job of the tiny size; its run directory is `run`. `plan`: with `megarl plan` before it."""

    def __init__(
        self,
        cluster: Cluster,
        run: Path,
        nodes: int,
        *settings: str,
        options: tuple[str, ...] = (),
        plan: bool = False,
    ) -> None:
        self.cluster, self.run = cluster, run
        run.parent.mkdir(parents=True, exist_ok=True)
        self.output = run.parent / f"{run.name}.out"
        flags = ["--parsable", f"--nodes={nodes}", f"--chdir={ROOT}", f"--output={self.output}", *options]
        variables = {"SIZE": "tiny", "RUN": str(run), "OMP_NUM_THREADS": "1", "SKIP_PLAN": "" if plan else "1"}
        variables["IDLE_DEADLINE"] = str(IDLE_DEADLINE)
        self.id = cluster.slurm("sbatch", *flags, SCRIPT, *settings, cwd=ROOT, **variables).strip()

    def shown(self) -> dict[str, str]:
        """What `scontrol show job` says; a JobState of GONE once Slurm has forgotten the job, of ? when it is too
        busy to answer."""
        shown = self.cluster.slurm("scontrol", "show", "job", "--oneliner", self.id, check=False)
        state = "GONE" if "Invalid job id" in shown else "?"
        return {"JobState": state, "Restarts": ""} | dict(re.findall(r"(\w+)=(\S*)", shown))

    def nodes(self) -> list[str]:
        """Names of the nodes that it runs on; the engine's is the last."""
        return self.cluster.slurm("scontrol", "show", "hostnames", self.shown()["NodeList"]).split()

    def wait_for_step(self, step: int, attempt: int) -> None:
        """Until attempt number `attempt` has finished training step `step`; returns at once then."""
        log = self.run / "logs" / f"job-{self.id}-{attempt}" / "rank-0.log"

        def reached() -> bool:
            return any(n >= step for n in map(int, re.findall(r"^step (\d+)/", _text(log), re.M)))

        def soon(_: dict[str, str]) -> bool:
            """Looks often, between questions to Slurm."""
            with suppress(TimeoutError):
                wait_for(reached, "the step", 2.0, poll=0.05)
                return True
            return False

        self._wait(soon, f"step {step} of attempt {attempt} of")

    def wait_for_attempt(self, attempt: int) -> None:
        """Until the job has been started again so often."""
        self._wait(
            lambda shown: (shown["Restarts"], shown["JobState"]) == (str(attempt), "RUNNING"), f"attempt {attempt} of"
        )

    def wait_until_completed(self) -> None:
        self._wait(lambda shown: shown["JobState"] == "COMPLETED", "the end of")

    def steps(self) -> list[dict[str, Any]]:
        """The run's metrics, without what may differ between two equal runs."""
        lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if not k.startswith(UNEQUAL)} for line in lines]

    def ledger(self, step: int) -> list[Any]:
        """The ledger of the checkpoint after `step`."""
        return list(Ledger.load(self.run / "checkpoints" / f"step_{step:06d}"))

    def _wait(self, reached: Callable[[dict[str, str]], bool], what: str) -> None:
        """Raises AssertionError with the end of every log when the job has failed."""

        def look() -> bool:
            shown = self.shown()
            if shown["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "GONE"):
                logs = [self.output, *sorted(self.run.glob("logs/job-*/*.log"))]
                words = "\n".join(f"--- {log}\n{_text(log)[-1500:]}" for log in logs)
                raise AssertionError(f"job {self.id} is {shown['JobState']}\n{words}")
            return reached(shown)

        wait_for(look, f"{what} job {self.id}", DEADLINE, poll=1.0)


def _text(file: Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""
