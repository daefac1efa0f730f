"""What slurm/launch.sh starts where, with stand-ins for Slurm's commands; test_jobs.py has the real ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = {
    "scontrol": 'case "$1 $2" in "show hostnames") printf "n1\\nn2\\nn3\\nn4\\n" ;; esac',
    "squeue": "echo RUNNING",
    "sbatch": 'echo "$RUN $*" >>"$STARTED.jobs"; wc -l <"$STARTED.jobs"',
    # Notes what is run on which nodes. A server stays until it is told to leave; the learner comes after it.
    "srun": """
        trap 'exit 0' USR2
        nodes=$(grep -o 'nodelist=[^ ]*' <<<"$*")
        key=$(grep -o 'api_key_file=[^ ]*' <<<"$*") && stat --format=%a:%s "${key#*=}" >>"$STARTED.keys"
        case "$*" in
            *" train "*addresses* | *" eval "*addresses*) until grep -q ' serve ' "$STARTED"; do sleep 0.05; done ;;
        esac
        echo "$nodes $(grep -o 'megarl.cli .*' <<<"$*")" >>"$STARTED"
        case "$*" in *" serve "*) while sleep 0.05; do :; done ;; esac
        [[ "$*" == *" ${FAILS:-none} "* ]] || exit 0
        log=$(grep -o -- '--output=[^ ]*' <<<"$*")
        log=${log#--output=}
        echo "megarl: that cannot be" >"${log//%t/0}"
        exit 2
    """,
}


@pytest.fixture
def run(tmp_path: Path):
    """Runs a script of slurm/ on four pretended nodes of 8 GPUs; gives its exit code, output and what it started."""
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        stub = tmp_path / "bin" / name
        stub.write_text(f"#!/usr/bin/env bash\n{body}\n")
        stub.chmod(0o755)
    started = tmp_path / "started"

    def submit(*command: str, **variables: str) -> tuple[int, str, dict[str, str]]:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_GPUS_ON_NODE": "8"}
        path = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "STARTED": str(started),
            "RUN": str(tmp_path / "run"),
        }
        environment = {**os.environ, **slurm, **path, **variables}
        done = subprocess.run(
            ["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        lines = started.read_text().splitlines() if started.exists() else []
        return done.returncode, done.stdout, {line.split()[2]: line for line in lines}

    return submit


def test_learners_first_engines_last(run) -> None:
    """32B: two nodes of learners, two of engines with two servers each; the settings reach every command."""
    code, output, started = run("slurm/train_qwen3_32b.sh", "steps=3")
    assert code == 0, output
    assert set(started) == {"doctor", "plan", "train", "serve"}
    assert started["doctor"].startswith("nodelist=n1,n2,n3,n4 ")
    assert started["train"].startswith("nodelist=n1,n2 ")
    assert started["serve"].startswith("nodelist=n3,n4 ")
    assert "--gpus 16" in started["plan"]
    assert "--resume" in started["train"]
    addresses = "[http://n3:20008,http://n3:20009,http://n4:20010,http://n4:20011]"
    for line in started.values():
        assert f"steps=3 rollout.servers.addresses={addresses}" in line
    assert "slurm/configs/qwen3_32b.yaml" in started["serve"]
    assert "--host 0.0.0.0 --port 20008" in started["serve"]


@pytest.mark.parametrize("fails", ["none", "doctor", "train"])
def test_the_jobs_key_is_in_a_private_file_until_the_end(run, tmp_path: Path, fails: str) -> None:
    """Every command gets its path, and none the key. It is 32 random bytes, for its owner alone, and is gone after a
    success, a refusal and a failure."""
    code, output, started = run("slurm/train_qwen3_32b.sh", FAILS=fails, SKIP_PLAN="1")
    assert (code == 0) == (fails == "none"), output
    file = tmp_path / "run" / ".engine-key-7"
    assert started and all(f"rollout.servers.api_key_file={file}" in line for line in started.values())
    modes = (tmp_path / "started.keys").read_text().split()
    assert modes and set(modes) == {"600:64"}
    assert not file.exists()


def test_engines_in_the_learners_ranks(run) -> None:
    _, _, started = run("slurm/train_qwen3_4b.sh", ENGINE_NODES="0", SKIP_PLAN="1")
    assert set(started) == {"doctor", "train"}
    assert started["train"].startswith("nodelist=n1,n2,n3,n4 ")
    assert started["train"].endswith("rollout.engine=local")


def test_eval_takes_a_run_directory(run, tmp_path: Path) -> None:
    """The checkpoint of the run is meant, its settings are its own, and it is not called with --resume."""
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.yaml").touch()
    code, output, started = run("slurm/eval.sh", str(folder), FLAGS="--temperature 0.6")
    assert code == 0, output
    assert f"megarl.cli eval {folder} run={folder} " in started["eval"]
    assert started["eval"].endswith("--temperature 0.6")
    assert f"serve {folder}/config.yaml" in started["serve"]


def test_convert_passes_its_arguments_on(run) -> None:
    wanted = "hf-to-megatron models/Qwen3-32B converted/Qwen3-32B tp=4 pp=4"
    code, output, started = run("slurm/convert.sh", *wanted.split())
    assert code == 0, output
    assert [line.strip() for line in started.values()] == [f"megarl.cli convert {wanted}"]


@pytest.mark.parametrize(("ranks", "devices"), [(None, "4,5,6,7"), ("6", "6,7")])
def test_colocated_engines_get_the_gpus_that_the_learner_leaves(run, ranks: str | None, devices: str) -> None:
    """Every node does both, but no GPU does: NCCL refuses two members of a group on one."""
    more = {"TASKS_PER_NODE": ranks} if ranks else {}
    code, output, started = run("slurm/train_qwen3_32b.sh", ENGINE_NODES="colocated", SKIP_PLAN="1", **more)
    assert code == 0, output
    assert all(started[name].startswith("nodelist=n1,n2,n3,n4 ") for name in ("train", "serve"))
    assert f"rollout.servers.devices=[{devices}] " in started["serve"]


def test_colocated_engines_without_a_gpu_are_refused(run) -> None:
    code, output, started = run("slurm/train_qwen3_32b.sh", ENGINE_NODES="colocated", TASKS_PER_NODE="8")
    assert (code, started) == (1, {})
    assert "TASKS_PER_NODE=8 leaves no GPU of 8 to the engines; at most 7" in output


def test_too_few_nodes_are_refused(run) -> None:
    code, output, started = run("slurm/train_qwen3_235b_a22b.sh")
    assert (code, started) == (1, {})
    assert "ENGINE_NODES=8 leaves no learner among 4 nodes" in output


@pytest.mark.parametrize("command", ["doctor", "train"])
def test_the_first_failure_ends_the_job_with_its_words(run, command: str) -> None:
    """Nothing is started after a refusal; a learner's failure ends the engines; the code is not that of success."""
    code, output, started = run("slurm/train_qwen3_32b.sh", FAILS=command, SKIP_PLAN="1")
    assert code == 1
    assert "megarl: that cannot be" in output
    assert ("serve" in started) == (command == "train")
