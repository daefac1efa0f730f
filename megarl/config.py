"""Every setting: typed, documented where it is declared, checked before anything is loaded.

One YAML file plus `key=value` overrides (`rollout.early_exit.enabled=true`). Unknown keys are refused.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megarl.errors import UserError, nearest

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A group of settings; unknown keys are refused by `load`, with the nearest known one named."""

    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class Model(Section):
    path: Path
    """Folder in Hugging Face's layout: config.json, tokenizer files, *.safetensors."""
    weights: Literal["pretrained", "random"] = "pretrained"
    """`random` initialises from the seed and needs no weight files."""


class Parallel(Section):
    """Megatron's layout. Data parallelism is derived: world size / (tp * pp * cp)."""

    tp: Positive = 1
    """Tensor-parallel size; must divide the attention heads and the key/value groups."""
    pp: Positive = 1
    """Pipeline stages; 1F1B schedule."""
    vpp: Positive = 1
    """Model chunks per pipeline stage (interleaved schedule); layers must be divisible by pp * vpp."""
    cp: Positive = 1
    """Context-parallel size: each sequence is split over this many ranks."""
    ep: Positive = 1
    """Expert-parallel size (mixture-of-experts models only)."""
    etp: Positive | None = None
    """Tensor-parallel size inside the experts; default: tp, as in Megatron."""
    sp: bool | None = None
    """Sequence parallelism of the norms; default: on when tp > 1."""
    distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap: bool = False
    """Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) with compute."""
    overlap_tp: bool = False
    """Overlap tensor-parallel communication with matrix products, by Transformer Engine's user buffers (CUDA only).
    Their size is fixed: every row is padded to tokens_per_row. Needs sequence parallelism and cp 1."""
    overlap_p2p: bool = True
    """Overlap the exchange between pipeline stages with compute (interleaved schedule only)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: of every layer, or of `recompute_modules`."""
    recompute_modules: list[Literal["core_attn", "layernorm", "mlp", "moe", "moe_act"]] = ["core_attn"]
    """What `selective` recomputes; `layernorm` and `moe_act` on Transformer Engine only."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the float32 gradient inside the matrix product (CUDA only); default: on where
    Transformer Engine and apex's kernel for it are installed."""
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """How context-parallel ranks exchange keys and values on Transformer Engine: a ring, or all-to-all over heads.
    Its other two ways refuse packed rows, and before version 2.10 so did all-to-all."""
    offload_optimizer: Fraction = 0.0
    """Share of the optimizer state kept, and updated, in host memory (CUDA only)."""
    offload_layers: Natural = 0
    """Layers whose activations wait for the backward pass in host memory (CUDA only; pp 1, no recomputation)."""

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def recomputed(self) -> list[str]:
        """Modules that selective recomputation is for."""
        return list(self.recompute_modules) if self.recompute == "selective" else []

    @property
    def sequence_parallel(self) -> bool:
        return self.tp > 1 if self.sp is None else self.sp


class Experts(Section):
    """Of a mixture of experts, by Megatron's names (`moe_…`)."""

    router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """Loss that evens out the experts' load: of every packed row, or of every sequence, whatever row it is in. Each
    counts by its input tokens, padding does not count."""
    aux_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of that loss, summed over layers, a mean over the update's input tokens. Metrics report its mean over
    layers as `load_balance`: 1 = balanced."""
    z_loss_coeff: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of the squared log-sum-exp of the router's logits, likewise; 0 = off."""
    router_dtype: Literal["fp32", "fp64"] = "fp32"
    """What the learner's router computes in."""

    @property
    def auxiliary(self) -> bool:
        """Whether there is a loss beside the policy's."""
        return self.aux_loss_coeff > 0 or self.z_loss_coeff > 0


class Precision(Section):
    dtype: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Compute type of the learner. `fp8` is Transformer Engine's on a GPU and emulated, slowly, on a CPU."""
    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling recipe; read only when dtype is fp8."""
    high_precision_layers: Natural = 0
    """So many of the first and of the last layers stay in bf16; read only when dtype is fp8."""


class Batch(Section):
    """The three sizes. Everything else is derived from them and printed at start."""

    prompts_per_step: Positive = 512
    """Prompts rolled out per step."""
    completions_per_prompt: Annotated[int, Field(ge=2)] = 8
    """Group size G."""
    prompts_per_update: Positive | None = None
    """Prompts per optimizer update; default: all of the step (exactly on-policy)."""
    tokens_per_row: Positive = 16384
    """Capacity of one packed row, and so of one micro-batch, in tokens."""

    @property
    def updates_per_step(self) -> int:
        return self.prompts_per_step // (self.prompts_per_update or self.prompts_per_step)


class Data(Section):
    train: list[Path]
    """JSONL, JSON or Parquet files of problems, in the hub's layouts."""
    eval: list[Path] = []
    """Held-out problems."""
    chat_template: Literal["auto", "none"] = "auto"
    """`auto` applies the tokenizer's chat template when it has one; `none` tokenises the prompt as it is."""
    system_prompt: str | None = None
    """Prepended as a system message when the chat template is used."""
    max_prompt_tokens: Positive = 2048
    """Longer prompts are left out, and counted."""
    eval_limit: Positive | None = None
    """Evaluate on the first so many held-out problems only."""
    shuffle: bool = True
    """A new order every epoch, from the seed."""


class EarlyExit(Section):
    """Step-GRPO's dynamic truncated rollout (arXiv 2604.16890); defaults are the paper's. See rollout/early_exit.py."""

    enabled: bool = False
    """Truncate training rollouts at step markers. Evaluation never exits early."""
    markers: list[str] = ["Wait"]
    """Stand-alone words that begin a new reasoning step."""
    think_end: str = "</think>"
    """Closes the thought; one token of the tokenizer, or several."""
    inducer: str | None = None
    """Appended to the finished steps to ask for a trial answer; default: the variant's."""
    closing: str = "\n</think>\n\n"
    """Inserted when the thought is ended early or runs out of budget."""
    probe_tokens: Annotated[int, Field(ge=2)] = 20
    """Longest trial answer."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Exit when the confidence is strictly greater."""
    strict: bool = True
    """Confidence is 0 unless the trial answer ends with `think_end`."""
    averaging: Literal["geometric", "arithmetic"] = "geometric"
    """Mean over the probabilities of the trial's tokens, the first left out (DEER, arXiv 2504.15895, takes the
    arithmetic one for R1-distilled models)."""
    probe_temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 = greedy, as released; DEER samples at 1."""
    thinking_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Share of the response budget that the thought may use."""
    near_budget: Natural = 50
    """At a marker with at most so many thinking tokens left, exit without asking."""
    max_probes: Natural = 10
    """After so many declined probes the completion runs free."""
    repetition_limit: Positive = 3
    """End the thought at so many steps that had the same set of words as the step before them."""
    exit_fraction: Fraction = 1.0
    """Share of each group that may exit early; the others are generated plainly, to be compared with (ours)."""
    schedule: Literal["blocking", "speculative"] = "blocking"
    """`speculative` runs the probe beside the continuation and aborts the loser."""
    variant: Literal["released", "paper_text"] = "released"
    """`released`: inducer "\\n**Final Answer**\\n\\\\boxed", the trial answer is discarded and the answer sampled.
    `paper_text`: inducer "</think> The final answer is", the trial answer, up to the end of text, is the output."""

    @property
    def trial_inducer(self) -> str:
        """The inducer in force."""
        if self.inducer is not None:
            return self.inducer
        return "\n**Final Answer**\n\\boxed" if self.variant == "released" else "</think> The final answer is"


class Servers(Section):
    """Rollout servers (SGLang, vLLM): started by megarl, or already running."""

    count: Positive = 1
    """Servers to start on this machine."""
    addresses: list[str] = []
    """`http://host:port` of running servers; empty = start `count` of them."""
    python: Path | None = None
    """Interpreter of the engine's own environment; default: `.engines/<engine>/bin/python`."""
    flags: list[str] = []
    """Passed through to the server."""
    api_key_env: str | None = None
    """Environment variable that holds the API key; never written to logs."""
    start_deadline: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for a server to become healthy."""
    request_deadline: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds for one request, retries included."""
    attempt_deadline: Annotated[float, Field(gt=0)] = 900.0
    """Seconds for one attempt at a request, before it is redone elsewhere."""
    restarts: Natural = 3
    """How often one server may be started again (or awaited, when megarl did not start it) before it is given up."""
    concurrency: Positive = 256
    """Requests in flight per server."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What started servers run on; `auto` = CUDA where the trainer sees a GPU."""
    sync: Literal["auto", "disk", "tensor", "distributed"] = "auto"
    """How weights travel; `auto` takes the fastest that the engine can do here."""


class Rollout(Section):
    engine: Literal["local", "sglang", "vllm"] = "local"
    """`local` is embedded in the learner ranks, or served by `megarl serve` where `servers.addresses` names servers:
    small models, no second environment."""
    max_response_tokens: Positive = 16384
    """Response budget, thought and answer together."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of training rollouts; log-probs are taken at it."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of training rollouts; 1 = all, which keeps sampling and training the same distribution."""
    top_k: Natural = 0
    """0 = all."""
    local_batch: Positive = 64
    """Sequences that one `local` engine decodes at a time."""
    deadline: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds for the rollout of one step."""
    partial: bool = False
    """With async_steps: completions under way at a weight update go on under the new weights, each span of tokens with
    its own version; else the update waits for them."""
    mismatch_limit: Annotated[float, Field(gt=0)] = 0.5
    """Mean |train - rollout| log-prob over a step above which the run stops; with async_steps it holds the drift of the
    policy since the rollout too."""
    canary_limit: Annotated[float, Field(gt=0)] = 0.1
    """Largest |engine - learner| log-prob of a canary token after a weight sync; beyond it the run stops. For tokens
    below -1 nat it grows in proportion to their log-prob, as rounding does. A learner in FP8 computes the canary in
    bf16, as engines do."""
    replay_routing: bool = False
    """Train every token through the experts that it passed through in the rollout (mixture-of-experts models, embedded
    engine). Takes 2 bytes a token, layer and chosen expert in every learner rank's memory."""
    early_exit: EarlyExit = EarlyExit()
    servers: Servers = Servers()

    @property
    def embedded(self) -> bool:
        """Whether every learner rank has its own engine."""
        return self.engine == "local" and not self.servers.addresses


class Evaluation(Section):
    every: Natural = 20
    """Steps between evaluations; 0 = only before the first and after the last step."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.6
    """0 = greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Nucleus of evaluation; 1 = all."""
    samples: Positive = 1
    """Completions per held-out problem."""
    max_response_tokens: Positive | None = None
    """Default: the rollout's."""


class Reward(Section):
    function: str = "megarl.rewards.math:grade"
    """`package.module:function(response: str, answer: str) -> bool | float | Verdict`."""
    workers: Positive = 2
    """Grader processes."""
    timeout: Annotated[float, Field(gt=0)] = 10.0
    """Seconds a verdict may take before its worker is killed."""
    shaping: Literal["none", "step_aware", "length_penalty", "overlong"] = "none"
    """Step-GRPO's step-aware reward, a linear length penalty, or DAPO's soft overlong punishment."""
    alpha: Fraction = 0.9
    """Share of correctness against format: R = alpha * acc + (1 - alpha) * fmt. 1 = correctness alone."""
    beta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Strength of the step-aware term."""
    step_mean: Literal["correct", "all"] = "correct"
    """Over which completions of the group the mean step count is taken."""
    markers: list[str] = ["Wait"]
    """Step markers counted by the reward; the rollout has its own list."""
    length_penalty: Annotated[float, Field(ge=0.0)] = 0.0
    """Reward taken off per response token (shaping = length_penalty)."""
    overlong_buffer: Natural = 4096
    """Tokens before the limit over which the overlong punishment grows from 0 to 1 (shaping = overlong)."""


class KL(Section):
    coef: Annotated[float, Field(ge=0.0)] = 0.0
    """0 = no reference model is kept."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Of the KL divergence from a token's log-probs: log ratio, half its square, or the unbiased one >= 0."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, or taken off the reward of a completion."""


class Algorithm(Section):
    """Switches of the one loss function. A preset fills what is not set; see algorithms/presets.py."""

    preset: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"] = "grpo"
    """The algorithm: a row of algorithms/presets.py."""
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] | None = None
    """Group-normalised; group-centred; leave-one-out; centred in the group and normalised over the batch."""
    ratio: Literal["token", "sequence", "cispo"] | None = None
    """Importance ratio: per token (PPO), per sequence (GSPO), or clipped weight with stop-gradient (CISPO)."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = None
    """What the summed loss is divided by."""
    constant: Positive | None = None
    """Divisor of `constant` aggregation, in tokens; default: the response budget."""
    clip_low: Annotated[float, Field(ge=0.0)] | None = None
    """Lower clip: the ratio is held above 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0.0)] | None = None
    """Upper clip: the ratio is held below 1 + clip_high."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound on the loss of negative advantages (off when unset)."""
    tis_cap: Annotated[float, Field(gt=0.0)] | None = None
    """Truncated importance sampling between rollout and training log-probs (off when unset)."""
    entropy_coef: Annotated[float, Field(ge=0.0)] = 0.0
    """Strength of the entropy bonus; 0 = off."""
    kl: KL = KL()
    dynamic_sampling: bool | None = None
    """DAPO: leave out groups whose rewards are all equal and draw further prompts in their place."""
    old_logprobs: Literal["auto", "recompute", "rollout"] = "auto"
    """Denominator of the ratio. `auto`: the policy's own when a step has one update, else recomputed."""


class Pruning(Section):
    """DPPO, dynamic pruning policy optimization (arXiv 2603.04135). Rates of 0 switch it off."""

    prompts: Rate = 0.0
    """r_q: chance that a prompt of below-mean history is left out before the rollout."""
    completions: Rate = 0.0
    """r_o: chance that a completion of below-mean |advantage| is left out before training."""
    draw: Literal["bernoulli", "fixed"] = "bernoulli"
    """Independent draws, or exactly floor(rate * n) of the low class."""
    selection: Literal["random_low", "proportional", "deterministic"] = "random_low"
    """`proportional` keeps the low ones with chance score / mean score, at least 1 - rate: less added variance.
    `deterministic` drops the lowest: an ablation, biased."""
    drop_zero_variance: bool = True
    """Leave out groups whose rewards are all equal when there is no KL or entropy term (exact then)."""
    refill: bool = True
    """Draw further prompts for the pruned ones, so that each step rolls out prompts_per_step."""
    until: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """No pruning after this share of the run."""
    min_effective: Fraction = 0.25
    """Warn when the effective sample size falls below this share of the kept samples."""


class Packing(Section):
    strategy: Literal["dense", "none", "sorted", "first_fit"] = "dense"
    """`dense`: Dense Prompt Packing; `none`: one sequence a row; `sorted` and `first_fit`: decreasing length."""
    window: Positive = 256
    """Pending items that dense packing looks at."""


class Optimizer(Section):
    lr: Annotated[float, Field(gt=0.0)] = 1e-6
    """Learning rate of AdamW, after the warm-up."""
    min_lr: Annotated[float, Field(ge=0.0)] = 0.0
    """Where `decay` ends; at most `lr`."""
    warmup_steps: Natural = 0
    """Updates of linear warm-up from 0."""
    decay: Literal["constant", "linear", "cosine"] = "constant"
    """From `lr` to `min_lr` over the run, after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's, added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """AdamW's, of matrices; norms and biases have none."""
    clip_grad: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 = no clipping."""


class Checkpoint(Section):
    every: Natural = 20
    """Steps between checkpoints; 0 = only after the last step."""
    keep: Positive = 2
    """Newest checkpoints kept."""
    optimizer: bool = True
    """Save what is needed to resume, not the weights alone."""
    asynchronous: bool = False
    """Write a copy of the state while training goes on: takes that much more host memory, and hides the disk's time."""


class Settings(Section):
    """A whole run."""

    run: Path
    """The run directory: config, metrics, rollouts, checkpoints, report."""
    seed: int = 0
    """Of every draw: order, sampling, pruning, random weights. The same seed repeats a run."""
    steps: Positive = 100
    """Training steps; one rollout each."""
    trackers: list[Literal["wandb", "mlflow"]] = []
    """Services that get the figures too, beside `metrics.jsonl` and TensorBoard: `pip install 'megarl[wandb,mlflow]'`.
    Their own environment variables say where: `WANDB_PROJECT`, `MLFLOW_TRACKING_URI` and so on."""
    async_steps: Natural = 0
    """So many steps' rollouts go on while one trains; 0 = strictly on-policy. No trained token is staler than so many
    updates; `algorithm.tis_cap` weighs the difference. More than 1 needs `rollout.partial`."""
    model: Model
    data: Data
    parallel: Parallel = Parallel()
    experts: Experts = Experts()
    precision: Precision = Precision()
    batch: Batch = Batch()
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    pruning: Pruning = Pruning()
    packing: Packing = Packing()
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    collective_deadline: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds a collective between ranks may take before the run ends and says which."""
    heartbeat_deadline: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without a sign of life after which a rank counts as stopped, or its node as lost, and the run ends."""

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        b = self.batch
        if b.prompts_per_update and b.prompts_per_step % b.prompts_per_update:
            nearest_valid = _nearest_divisor(b.prompts_per_step, b.prompts_per_update)
            raise ValueError(
                f"batch.prompts_per_update: {b.prompts_per_update} does not divide prompts_per_step "
                f"{b.prompts_per_step}; the nearest that does is {nearest_valid}"
            )
        x = self.experts
        if (x.router_load_balancing_type == "none") != (x.aux_loss_coeff == 0):
            raise ValueError(
                f"experts.aux_loss_coeff: {x.aux_loss_coeff:g} with router_load_balancing_type "
                f"{x.router_load_balancing_type}; valid: 0 with none, above 0 (e.g. 1e-3) with aux_loss or seq_aux_loss"
            )
        replay = self.rollout.replay_routing
        if (x.auxiliary or replay) and "moe" in self.parallel.recomputed:
            raise ValueError(
                "parallel.recompute_modules: moe loses track of the row that auxiliary losses and replayed routing are "
                "of; take it out, or set recompute: full"
            )
        if replay and not self.rollout.embedded:
            engine = "a served local engine" if self.rollout.engine == "local" else self.rollout.engine
            raise ValueError(
                f"rollout.replay_routing: true, but {engine} does not report its experts; set rollout.engine: local "
                "without servers.addresses, or false"
            )
        if replay and self.rollout.partial:
            raise ValueError(
                "rollout.replay_routing: true, but with rollout.partial one completion has the experts of several "
                "weights; set one of them to false"
            )
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(f"optimizer.min_lr: {self.optimizer.min_lr:g} is above lr; at most {self.optimizer.lr:g}")
        if self.pruning.selection == "proportional" and self.pruning.draw == "fixed":
            raise ValueError("pruning.draw: fixed has one chance for all, proportional one for each; set bernoulli")
        a = self.async_steps
        if a and self.algorithm.tis_cap is None and self.algorithm.old_logprobs != "rollout":
            raise ValueError(
                f"algorithm.tis_cap: unset, but with async_steps {a} older weights sample what is trained; set e.g. 2"
            )
        if a > 1 and not self.rollout.partial:
            raise ValueError(
                f"async_steps: {a} needs rollout.partial: true, for a weight update that waits for whole completions "
                "leaves nothing to roll out further ahead; else at most 1"
            )
        if self.rollout.partial and not a:
            raise ValueError("rollout.partial: true does nothing with async_steps 0; set that to 1 or more")
        e = self.rollout.early_exit
        if e.enabled and not e.markers:
            raise ValueError("rollout.early_exit.markers: [] names no marker; the paper's is ['Wait']")
        if (
            e.enabled
            and self.rollout.max_response_tokens - int(e.thinking_share * self.rollout.max_response_tokens) < 2
        ):
            raise ValueError(
                f"rollout.early_exit.thinking_share: {e.thinking_share} of {self.rollout.max_response_tokens} tokens "
                "leaves no room for an answer; lower it, e.g. 0.9"
            )
        return self


def load(path: Path, overrides: list[str] | None = None) -> Settings:
    """Read a YAML file, apply `key=value` overrides and validate; relative paths are taken from the working directory.

    Raises UserError, one line a mistake, naming the setting and a valid value.
    """
    if not path.is_file():
        raise UserError(f"config: {path} does not exist")
    try:
        tree = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as e:
        raise UserError(f"config: {path} is not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"config: {path} holds a {type(tree).__name__}, not settings")
    for text in overrides or []:
        _override(tree, text)
    return parse(tree)


def parse(tree: dict[str, Any]) -> Settings:
    """Validate a tree of settings; raises UserError."""
    try:
        return Settings.model_validate(tree)
    except ValidationError as e:
        raise UserError("\n".join(_line(error) for error in e.errors())) from None


def dump(settings: Settings) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override: '{text}' is not of the form key=value")
    *parents, leaf = key.split(".")
    node = tree
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"override: '{key}': '{name}' holds a value, not settings")
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        node[leaf] = value
    # YAML 1.1 reads "1e-4" as a string; people mean the number.
    if isinstance(node[leaf], str):
        with suppress(ValueError):
            node[leaf] = float(value)


def _line(error: Any) -> str:
    """One pydantic error as one line."""
    location = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{location}: unknown setting{nearest(str(error['loc'][-1]), _fields_at(error['loc'][:-1]))}"
    if error["type"] == "missing":
        return f"{location}: is required"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{location}: {error['input']!r}: {message}" if location else message


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    section: Any = Settings
    for name in location:
        annotation = section.model_fields[name].annotation
        section = next((a for a in (annotation, *get_args(annotation)) if hasattr(a, "model_fields")), None)
        if section is None:
            return []
    return list(section.model_fields)


def _nearest_divisor(n: int, wanted: int) -> int:
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - wanted))
