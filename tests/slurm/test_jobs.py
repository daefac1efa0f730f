"""The entry point of a user, on a real Slurm of four nodes on this host: trains, is refused, is disturbed, comes back.

The nodes are namespaces of one machine with fake GPUs, the model is the quick start's, and the engine is the embedded
one, served on a node of its own. Not shown here: GPUs, InfiniBand, containers, SGLang (see slurm/README.md).
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, wait_for
from tests.support.jobs import IDLE_DEADLINE, ROOT, SCRIPT, Job

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3600)]

STEPS = 12
SETTINGS = (f"steps={STEPS}",)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Four nodes; its end raises when a job left a process."""
    with Cluster(4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def untouched(cluster: Cluster, folder: Path) -> Job:
    """A run of 2 nodes that nobody disturbs; it runs beside the first tests."""
    return Job(cluster, folder / "untouched", 2, *SETTINGS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus-per-node=9"], "Requested node configuration is not available"),
        (["--nodes=5"], "Node count specification invalid"),
    ],
)
def test_wrong_resources_are_refused_at_submit(cluster: Cluster, options: list[str], words: str) -> None:
    """More GPUs than a node has, more nodes than there are: sbatch fails, says why, and nothing is queued for it."""
    before = cluster.slurm("squeue", "--noheader", "--format=%i")
    done = subprocess.run(
        ["sbatch", *options, SCRIPT], cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0
    assert words in done.stderr.splitlines()[-1]
    assert cluster.slurm("squeue", "--noheader", "--format=%i") == before


def test_disturbed_run_ends_as_the_untouched_one(cluster: Cluster, untouched: Job, folder: Path) -> None:
    """One job gets the signal of its time limit, then `scontrol requeue`, then loses its engine's node (the cable is
    pulled): three times it comes back, and its ledger, losses and every other figure of every step equal the untouched
    run's. What is left on the lost node, which Slurm cannot reach, ends by itself. The signal is sent as Slurm sends
    it, to the batch shell alone; that Slurm does so in time is not shown."""
    job = Job(cluster, folder / "disturbed", 2, *SETTINGS)

    job.wait_for_step(1, attempt=0)
    cluster.slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for_attempt(1)
    assert "the time limit is near" in job.output.read_text()
    saved = sorted(path.name for path in (job.run / "checkpoints").glob("step_*"))
    assert saved, "nothing was saved at the time limit"

    job.wait_for_step(int(saved[-1].removeprefix("step_")) + 1, attempt=1)
    cluster.slurm("scontrol", "requeue", job.id)
    job.wait_for_attempt(2)

    job.wait_for_step(1, attempt=2)
    lost = job.nodes()[-1]
    cluster.link(lost, up=False)
    try:
        job.wait_for_attempt(3)
        job.wait_until_completed()
        wait_for(lambda: not cluster.processes(job.id, lost), "the lost node's engine to end", 2 * IDLE_DEADLINE)
    finally:
        cluster.link(lost, up=True)
    assert "no client has sent anything" in (job.run / "logs" / f"job-{job.id}-2" / "engine-0.log").read_text()
    assert_ended_as(job, untouched)


def test_preempted_run_ends_as_the_untouched_one(cluster: Cluster, untouched: Job, folder: Path) -> None:
    """A job of a partition of higher priority takes one of the run's nodes: Slurm asks the run to leave, requeues it,
    and it ends as the untouched one. Whether a real step is saved within a real grace time is not shown."""
    job = Job(cluster, folder / "preempted", 2, *SETTINGS)
    job.wait_for_step(1, attempt=0)
    wanted = ["--partition=urgent", f"--nodelist={job.nodes()[-1]}", "--gpus-per-node=8", "--output=/dev/null"]
    urgent = cluster.slurm("sbatch", "--parsable", *wanted, "--wrap=true").strip()
    job.wait_for_attempt(1)
    assert "JobState=COMPLETED" in cluster.slurm("scontrol", "show", "job", "--oneliner", urgent)
    assert "Slurm asks the job to leave" in job.output.read_text()
    job.wait_until_completed()
    assert_ended_as(job, untouched)


def assert_ended_as(job: Job, untouched: Job) -> None:
    """Every figure of every step, and the ledger, are the untouched run's, and no process of the job is left."""
    untouched.wait_until_completed()
    wait_for(lambda: not job.cluster.processes(job.id), f"the processes of job {job.id} to end", 60)
    assert [line["step"] for line in job.steps()] == list(range(1, STEPS + 1))
    assert job.steps() == untouched.steps()
    assert job.ledger(STEPS) == untouched.ledger(STEPS)
    assert len(job.ledger(STEPS)) == STEPS


def test_cancelled_job_leaves_no_process(cluster: Cluster, folder: Path) -> None:
    """`scancel` in mid-training: ranks, graders, engine and its reaper are all gone within Slurm's own grace time."""
    job = Job(cluster, folder / "cancelled", 2, "steps=1000")
    job.wait_for_step(1, attempt=0)
    assert len(cluster.processes(job.id)) >= 6  # rank, grader, their fork server; serve, reaper, engine
    cluster.slurm("scancel", job.id)
    wait_for(lambda: not cluster.processes(job.id), f"the processes of job {job.id} to end", 60)
    wait_for(lambda: not cluster.slurm("squeue", "--noheader"), "the queue to empty", 30)


def test_four_nodes_train_to_the_end(cluster: Cluster, folder: Path) -> None:
    """Three learner nodes and one of the engine: every node's part is where the launcher says, the job completes, the
    queue is empty and no process is left."""
    wait_for(cluster.idle, "all nodes to be idle", 60)
    job = Job(cluster, folder / "four", 4, "steps=2", plan=True)
    job.wait_until_completed()
    logs = job.run / "logs" / f"job-{job.id}-0"
    assert sorted(path.name for path in logs.glob("rank-*")) == ["rank-0.log", "rank-1.log", "rank-2.log"]
    assert "3 x 1 learner ranks on node1 node2 node3; engines on node4" in job.output.read_text()
    assert [line["step"] for line in job.steps()] == [1, 2]
    assert f"done: {job.run}" in job.output.read_text()
    wait_for(lambda: not cluster.processes(), "the last processes to end", 30)
    assert not cluster.slurm("squeue", "--noheader")
