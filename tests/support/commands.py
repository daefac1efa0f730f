"""How each command of the documentation is executed: here (by test_documented.py), by another test, or not, and why.

A run that takes minutes or hours is made short by further settings, which `more` holds: the command is the documented
one, the work is one step of a few tokens. `run` says what stands in where a command names many nodes, or only a part of
itself. Studies are cut to one seed and the smallest size of each kind (test_documented.py).
"""

from __future__ import annotations

from dataclasses import dataclass

QUICKSTART, MODEL, CLUSTER = (
    "examples/quickstart/train.yaml", "examples/quickstart/reasoner", "examples/scaling/qwen3_32b/run.yaml",
)  # fmt: skip
WIDE = "wide"  # a random model whose heads and layers split into tp 8, pp 4: driver.py makes it
TINY = (
    "steps=1 parallel.tp=1 data.eval=[] rollout.max_response_tokens=24 checkpoint.every=1 "
    "'batch={prompts_per_step: 4, completions_per_prompt: 4, tokens_per_row: 512}'"
)
EIGHT = "data.eval=[examples/quickstart/problems/heldout.jsonl] evaluation.limit=8"
STUDY = f"steps=1 {EIGHT} rollout.max_response_tokens=24 batch.prompts_per_step=4 batch.completions_per_prompt=4"
CONFIRMED = " --first-seed 40 --seeds 4 --methods grpo_strong,completions,dppo --rates 0.7"
REST = "test-all: test-slow test-cuda test-report test-slurm test-engines"
SERVERS = "needs real servers: `make test-engines`"
OWN = (
    "model.path=examples/quickstart/reasoner precision.dtype=fp32 rollout.engine=local rollout.early_exit.enabled=false"
)
PLACES = {"CONFIG": QUICKSTART, "RUN": "runs/quickstart", "RUN2": "runs/grpo", "N": "1", "MODEL": MODEL, "A": MODEL}


@dataclass(frozen=True)
class Rule:
    """Of one documented command, or of all that begin so (`*`)."""

    command: str
    run: str = ""  # what is executed here; placeholders stand for `PLACES`; "" = not here
    leaves: str = ""  # a file that it must write
    says: str = ""  # words that it must print
    test: str = ""  # else the test that executes it, as pytest names it, or the script that does, …
    by: str = ""  # … and what of its text does
    why: str = ""  # why it is not executed in this form by any test


def here(command: str, more: str = "", *, run: str = "", leaves: str = "", says: str = "") -> Rule:
    return Rule(command, f"{run or command} {more}".strip(), leaves, says)


def elsewhere(command: str, test: str, by: str, why: str = "") -> Rule:
    return Rule(command, test=test, by=by, why=why)


def never(command: str, why: str) -> Rule:
    return Rule(command, why=why)


# Executed in this order: what a command reads, an earlier one wrote.
TRAINING = [
    here("megarl train examples/quickstart/train.yaml run=runs/gpu *", "--dry-run", says="1 ranks = tp 1"),
    here("megarl train examples/quickstart/train.yaml", TINY, leaves="runs/quickstart/report.html"),
    here("make quickstart", TINY, run="megarl train examples/quickstart/train.yaml --resume", says="quickstart"),
    here("megarl train CONFIG --nproc N --dry-run --resume", "run=runs/synopsis", says="2 ranks = tp 2",
         run="megarl train CONFIG --nproc 2 --dry-run --resume"),
    here("megarl train examples/quickstart/train.yaml run=runs/grpo *", TINY, leaves="runs/grpo/metrics.jsonl"),
    here("megarl train examples/quickstart/train.yaml run=runs/dppo *", TINY, leaves="runs/dppo/metrics.jsonl"),
    here("megarl train examples/quickstart/train.yaml run=runs/tp1 *", says="1 ranks = tp 1"),
    here("megarl train CONFIG algorithm.advantage=*", f"{TINY} run=runs/rows", leaves="runs/rows/metrics.jsonl"),
    here("megarl train CONFIG rollout.early_exit.*", f"{TINY} run=runs/steps", leaves="runs/steps/metrics.jsonl"),
    here("megarl train CONFIG pruning.prompts=*", f"{TINY} run=runs/pruned", leaves="runs/pruned/metrics.jsonl"),
    here("megarl train CONFIG parallel.tp=8 *", f"run=runs/wide model.path={WIDE}", says="32 ranks = tp 8 x pp 4"),
    here("torchrun --nnodes 32 *", f"{TINY} run=runs/torchrun", leaves="runs/torchrun/metrics.jsonl",
         run="torchrun --nnodes 1 --nproc-per-node 1 --standalone -m megarl.cli train CONFIG"),
    *(elsewhere(f"megarl train CONFIG {added}*", f"tests/docs/test_adding.py::{test}", run) for added, test, run in
      (("reward.function=my_rewards", "test_the_reward_gives_the_verdicts", '"reward_and_algorithm"'),
       ("algorithm.preset=sign", "test_the_algorithm_gives_the_advantages", '"reward_and_algorithm"'),
       ("rollout.engine=scripted", "test_the_engine_writes_the_completions", '"engine"'),
       ("model.path=", "test_the_family_trains_as_it_was_meant", '"family"'))),
]  # fmt: skip
OWN_RUN = [  # README's settings, reward and problem, with the quick start's model in place of a large one
    here("megarl train my_run.yaml --dry-run", f"{OWN} {TINY}", says="1 ranks = tp 1"),
    here("megarl train my_run.yaml", f"{OWN} {TINY}", leaves="runs/mine/metrics.jsonl"),
    here("megarl report runs/mine", leaves="runs/mine/report.html"),
]  # fmt: skip
A_RUN = [
    here("megarl eval RUN|CONFIG --temperature 0.6 --temperature 1.0", EIGHT, says="accuracy",
         run="megarl eval RUN --temperature 0.6 --temperature 1.0"),
    here("megarl eval RUN|CONFIG --responses FILE", EIGHT, leaves="runs/held_out.jsonl",
         run="megarl eval RUN --responses runs/held_out.jsonl"),
    here("megarl eval RUN", EIGHT, says="accuracy"),
    here("megarl report RUN", leaves="runs/quickstart/report.html"),
    here("megarl report RUN RUN2", "--out both.html", leaves="both.html"),
    here("megarl tail RUN", "--once", says="step"),
    here("megarl trace RUN", leaves="runs/quickstart/trace.json"),
    here("megarl replay RUN --step N", says="step 1, replayed from the start"),
    here("tensorboard --logdir runs", "--port 0", says="data_location"),  # read by tests/run/test_directory.py
]  # fmt: skip
CONVERSIONS = [
    here("megarl convert hf-to-megatron SRC DST tp=8 pp=4", leaves="runs/wide_1", says="tensors",
         run=f"megarl convert hf-to-megatron {WIDE} runs/wide_1 tp=8 pp=4"),
    here("megarl convert hf-to-megatron MODEL OUT tp=8 pp=4", leaves="runs/wide_2",
         run=f"megarl convert hf-to-megatron {WIDE} runs/wide_2 tp=8 pp=4"),
    here("megarl convert hf-to-megatron MODEL OUT --format classic tp=8 pp=4", leaves="runs/classic",
         run=f"megarl convert hf-to-megatron {WIDE} runs/classic --format classic tp=8 pp=4"),
    here("megarl convert reshard A OUT tp=2 pp=2", leaves="runs/resharded",
         run="megarl convert reshard runs/classic runs/resharded tp=2 pp=2"),
    here("megarl convert hf-to-megatron MODEL OUT tp=2", leaves="runs/megatron",
         run="megarl convert hf-to-megatron MODEL runs/megatron tp=2"),
    here("megarl convert megatron-to-hf OUT BACK --config MODEL", leaves="runs/back/model.safetensors",
         run="megarl convert megatron-to-hf runs/megatron runs/back --config MODEL"),
    here("megarl convert megatron-to-hf CHECKPOINT OUT --config MODEL", leaves="runs/again/model.safetensors",
         run="megarl convert megatron-to-hf runs/megatron runs/again --config MODEL"),
    here("megarl convert megatron-to-hf RUN/checkpoints/step_000100 OUT", leaves="runs/out/model.safetensors",
         run="megarl convert megatron-to-hf runs/quickstart/checkpoints/step_000001 runs/out"),
    here("megarl convert verify MODEL BACK", run="megarl convert verify MODEL runs/back", says="equal"),
    here("megarl convert verify A B", run="megarl convert verify runs/classic runs/resharded", says="equal"),
    here("megarl convert compare A B", run="megarl convert compare MODEL runs/back", says="embed"),
    here("megarl convert inspect A", says="embed"),
    here("megarl convert average A B C --to OUT", leaves="runs/mean/model.safetensors",
         run="megarl convert average MODEL runs/back runs/again --to runs/mean"),
]  # fmt: skip
ASKING = [
    here("megarl plan CONFIG --gpus 256 --gpu h100", run=f"megarl plan {CLUSTER} --gpus 256 --gpu h100", says="GiB"),
    here("megarl plan CONFIG --gpus 256 --gpu h100 --search", says="tp",
         run=f"megarl plan {CLUSTER} --gpus 256 --gpu h100 --search"),
    elsewhere("megarl plan slurm/configs/qwen3_4b.yaml --gpus 8 --gpu h200",
              "tests/planner/test_plan.py::test_the_command_plans_a_shipped_configuration", "gpus=8"),
    here("megarl plan CONFIG --gpus N --search", run=f"megarl plan {CLUSTER} --gpus 64 --search", says="tp"),
    here("megarl plan CONFIG --search", run=f"megarl plan {CLUSTER} --search", says="tp"),
    here("megarl doctor CONFIG", says="megatron-core"),
    elsewhere("megarl doctor --gpus 1", "tests/doctor/test_doctor.py::test_failures_are_one_line_with_a_hint",
              '"--gpus"', "needs a CUDA device"),
    here("megarl markers MODEL", says="recipe: step_grpo"),
    here("megarl settings --recipe NAME", run="megarl settings --recipe step_grpo", says="early_exit"),
    here("megarl settings NAME", run="megarl settings rollout.early_exit", says="rollout.early_exit.threshold"),
    here("megarl bench", says="packing"),
]  # fmt: skip
LESSON = [
    here("python -m examples.quickstart.make_problems examples/quickstart/problems",
         leaves="examples/quickstart/problems/train.jsonl"),
    here("python -m examples.quickstart.make_problems examples/dppo/problems *",
         leaves="examples/dppo/problems/train.jsonl"),
    here("python -m examples.quickstart.make_problems examples/step_grpo/problems *",
         leaves="examples/step_grpo/problems/longer.jsonl"),
    here("python -m examples.quickstart.make_model examples/quickstart/reasoner",
         leaves="examples/quickstart/reasoner/tokenizer.json"),
    here("python -m examples.quickstart.make_problems runs/lesson --lesson 96000", leaves="runs/lesson",
         run="python -m examples.quickstart.make_problems runs/lesson --lesson 400"),
    here("megarl sft examples/quickstart/sft.yaml --nproc 2", "steps=1 optimizer.warmup_steps=0 parallel.tp=1",
         leaves="runs/sft/model/model.safetensors"),
    here("megarl sft CONFIG", "run=runs/sft_2 steps=1 optimizer.warmup_steps=0 parallel.tp=1",
         run="megarl sft examples/quickstart/sft.yaml", leaves="runs/sft_2/model/model.safetensors"),
    here("megarl sft CONFIG --resume", "run=runs/sft_2 steps=1 optimizer.warmup_steps=0 parallel.tp=1",
         run="megarl sft examples/quickstart/sft.yaml --resume", leaves="runs/sft_2/report.html"),
    here("megarl sft CONFIG --dry-run", "run=runs/sft_4", run="megarl sft examples/quickstart/sft.yaml --dry-run",
         says="demonstrations each"),
    here("cp runs/sft/model/model.safetensors examples/quickstart/reasoner/"),
]  # fmt: skip
OWN_MODEL = [
    elsewhere(command, "tests/examples/test_own_model.py::test_own_model_data_and_reward_train", by)
    for command, by in (("megarl train train.yaml", '"train.yaml"'), ("megarl train train.yaml --dry-run", "--dry-run"),
                        ("megarl markers HuggingFaceTB/SmolLM2-135M-Instruct --prompts problems.jsonl", '"markers"'))
]  # fmt: skip
STUDIES = [
    here("megarl scaling run *", says="0 missing"),
    elsewhere("megarl scaling submit examples/scaling/nodes.yaml*",
              "tests/scaling/test_slurm.py::test_each_cell_is_a_job_of_its_nodes", 'tool("submit"'),
    elsewhere("megarl scaling show examples/scaling/nodes.yaml",
              "tests/scaling/test_slurm.py::test_each_cell_is_a_job_of_its_nodes", 'tool("show"'),
    here("megarl scaling show *", says="0 missing"),
    elsewhere("megarl scaling submit *",
              "tests/scaling/test_slurm.py::test_slurm_gets_an_array_of_what_is_missing", 'tool("submit"'),
]  # fmt: skip
BENCHMARKS = [
    here("megarl bench packing", "--sequences 1024", says="verl_dynamic"),
    here("megarl bench controller", "--completions 16 --endpoints 2 --latency 0.05", says="completions"),
    *(here(f"megarl bench step_grpo --overrides parallel.tp=1{json}", leaves="runs/bench/step_grpo",
           run=f"megarl bench step_grpo --seeds 1 --methods grpo{json} --overrides 'parallel.tp=1 {STUDY}'")
      for json in ("", " --json docs/results/step_grpo.json")),
    here("megarl bench step_grpo --methods step_grpo --seeds 1 --runs runs/threshold *", leaves="runs/threshold",
         run="megarl bench step_grpo --methods step_grpo --seeds 1 --runs runs/threshold --overrides 'parallel.tp=1 "
             f"{STUDY} data.eval=[examples/quickstart/problems/validation.jsonl] rollout.early_exit.threshold=0.7'"),
    *(here(f"megarl bench dppo{options}{json}", leaves="runs/bench/dppo",
           run=f"megarl bench dppo --seeds 1 --methods grpo{json} --overrides '{STUDY} evaluation.samples=1'")
      for options, json in (("", ""), (CONFIRMED, ""), (CONFIRMED, " --json docs/results/dppo.json"))),
    here("megarl bench parity", "--layout tp1", says="qwen3_moe"),
    *(elsewhere(f"megarl bench grading{cases}", "tests/bench/test_grading_bench.py::test_rows_of_own_cases",
                "main(json=out, cases=file") for cases in ("", " --cases FILE")),
    here("megarl bench invariance", "--draws 1", says="rel_grad"),
    here("megarl bench unbiased", "--estimators zero_variance_dropped", says="max_rel_bias"),
    elsewhere("megarl bench conversion", "tests/bench/test_conversion_bench.py::test_every_direction_has_its_copy",
              'bench("conversion"'),
    elsewhere("megarl bench learner", "tests/bench/test_learner_bench.py::test_trainers_compute_the_same",
              'bench("learner"'),
    elsewhere("megarl bench rollout", "tests/bench/test_rollout_bench.py::test_engines_do_the_same_work",
              'bench("rollout"'),
    elsewhere("megarl bench rollout --engines local,transformers,sglang,vllm *",
              "tests/engines/test_benchmarks.py::test_tokens_a_second_of_a_real_server", 'bench("rollout"', SERVERS),
    *(elsewhere(command, "tests/bench/test_gpu_bench.py::test_the_rehearsal_runs_every_part", 'bench("gpu"', why)
      for command, why in (("megarl bench gpu --rehearse", ""), ("megarl bench gpu*", "needs a CUDA device"))),
    elsewhere("megarl bench early_exit",
              "tests/bench/test_early_exit_bench.py::test_schedules_and_refusals_change_nothing_but_time",
              'bench("early_exit"'),
    here("megarl bench planner", says="fits_accuracy"),
    elsewhere("megarl bench precision*",
              "tests/examples/test_precision_bench.py::test_two_precisions_are_taught_and_trained_and_not_again",
              'bench("precision"'),
    elsewhere("megarl bench memory",
              "tests/bench/test_memory_bench.py::test_one_rank_takes_the_memory_that_was_planned", 'bench("memory"'),
    elsewhere("megarl bench report",
              "tests/report/test_browser.py::test_ten_thousand_rollouts_open_in_three_seconds", 'bench("report"',
              "needs Chromium: `make test-report`"),
    elsewhere("megarl bench kill_anywhere*", "tests/bench/test_kill_anywhere.py::test_nothing_is_lost_or_repeated",
              'bench("kill_anywhere", "--kills"', "each kill is a run"),
    elsewhere("megarl bench canary*", "tests/e2e/test_canary.py::test_damaged_weights_are_caught_and_named",
              '"bench", "canary"', "scores 200 damaged models"),
    elsewhere("megarl bench weight_sync", "tests/engines/test_benchmarks.py::test_weights_arrive_by_every_way",
              'bench("weight_sync"', SERVERS),
]  # fmt: skip
ENGINES = [
    *(elsewhere(f"megarl train examples/quickstart/train.yaml run=runs/{engine} *",
                "tests/engines/test_training.py::test_the_loop_trains_on_a_real_server", f'"{engine}"', SERVERS)
      for engine in ("sglang", "vllm")),
    elsewhere("megarl serve CONFIG --host *", "tests/engines/test_ports.py::test_beyond_loopback_a_server_needs_a_key",
              "serve(keyless", "a key is needed; tests/slurm serves with one"),
    elsewhere("make engines", "Makefile", "test-engines: engines", "`make test-engines` of .ci/run begins so"),
    elsewhere("make test-engines", "Makefile", REST, "`make test-all` of .ci/run begins so"),
    elsewhere("megarl train CONFIG --nproc 4 rollout.engine=sglang rollout.servers.count=2 *",
              "tests/engines/test_flags.py::test_real_engines_refuse_what_they_do_not_know", "flags.checked(", SERVERS),
    *(elsewhere(command, "tests/engines/test_shown_servers.py::test_the_documented_server_is_trained_on", by, SERVERS)
      for command, by in (("MEGARL_ENGINE_KEY=* python MEGARL/*", "line(engine"), ("VLLM_API_KEY=*", "line(engine"),
                          ("megarl train CONFIG rollout.engine=sglang rollout.servers.addresses=*", "documented("))),
]  # fmt: skip
GPU_ONLY = (
    "source *", "export *", "python -c *", "pip install torch==*", "pip install nvidia-cuda-*",
    "pip install --no-deps *", "pip install setuptools *", "pip list", "CUDA_VISIBLE_DEVICES=*",
)  # fmt: skip
CLUSTERS = [
    *(elsewhere(command, "tests/slurm/test_jobs.py::test_four_nodes_train_to_the_end", "Job(cluster", why)
      for command, why in (("SIZE=tiny sbatch *", "needs a Slurm: `make test-slurm`"),
       ("sbatch slurm/train_qwen3_*", "GPU nodes: a script runs with SIZE=tiny; of every one "
        "tests/slurm/test_scripts.py checks settings, layout and memory"))),
    elsewhere("srun --ntasks-per-node 8 megarl train CONFIG", "slurm/launch.sh", "srun",
              "the line of the batch scripts, which tests/slurm submits to a real Slurm"),
    elsewhere("make test-cuda", "Makefile", REST, "`make test-all` of .ci/run begins so"),
    elsewhere("make test-slurm", "Makefile", REST, "`make test-all` of .ci/run begins so"),
    elsewhere("make test-all", ".ci/run", "make test-all"),
    elsewhere("make lint", ".ci/run", "make lint"),
    elsewhere("make test", ".ci/run", "make test"),
    elsewhere("make setup", "Makefile", "lint: setup", "`make lint` of .ci/run begins so"),
    elsewhere("make pictures", "tests/report/test_pictures.py", "pictures.screenshots(",
              "needs Chromium: `make test-report`; its training is the quick start's"),
    never("make test-gpu", "needs a CUDA device"),
    never("make lock", "resolves anew over the network; tests/test_lock.py checks what it wrote"),
    never("make latest", "installs the newest packages over the network, for a weekly job"),
    never("pip install --no-build-isolation --no-cache-dir -e *", "CUDA builds; setup.py declares the extras"),
    never("pip install -e *", "CUDA builds; setup.py declares the extras"),
    *(never(command, "needs a CUDA device: docs/gpu_first_run.md") for command in GPU_ONLY),
    elsewhere("pip install megarl[wandb,mlflow]", "setup.py", '"dev": [*WANDB, *MLFLOW,',
              "`make setup` installs them with `dev`, and tests/run/test_trackers.py uses them"),
    never("git clone *", "the address is the reader's; `make setup` precedes every target of .ci/run"),
]  # fmt: skip
TESTS = [Rule("pytest tests/*", why="a test: it must be there")]
RULES = [
    *TRAINING, *OWN_RUN, *OWN_MODEL, *A_RUN, *CONVERSIONS, *ASKING, *STUDIES, *BENCHMARKS, *LESSON, *ENGINES, *CLUSTERS,
    *TESTS,
]  # fmt: skip


def rule(command: str) -> Rule | None:
    """The first that covers a command; exact ones before those that end with `*`."""
    exact = [r for r in RULES if r.command == command]
    return next(iter(exact), None) or next((r for r in RULES if _covers(r.command, command)), None)


def _covers(pattern: str, command: str) -> bool:
    """`*` stands for anything; the other signs for themselves."""
    first, *rest = pattern.split("*")
    if not rest or not command.startswith(first):
        return False
    place = len(first)
    for part in rest:
        found = command.find(part, place)
        if found < 0:
            return False
        place = found + len(part)
    return pattern.endswith("*") or place == len(command)
