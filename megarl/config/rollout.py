"""Settings of rollouts: engines, early exit, and the sampling of evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megarl.config.section import Fraction, Natural, Positive, Section


class EarlyExit(Section):
    """Step-GRPO's dynamic truncated rollout (arXiv 2604.16890); defaults are the paper's. See rollout/early_exit."""

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
    refuse_early: bool = True
    """End a trial answer as soon as no rest of it could lift its mean over the threshold: the same exits for fewer
    tokens. A trial ended so has the confidence of the tokens it had. `local` only (servers tell log-probs at the end),
    and for geometric averaging."""
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
    start_timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds for a server to become healthy."""
    request_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds for one request, retries included."""
    attempt_timeout: Annotated[float, Field(gt=0)] = 900.0
    """Seconds for one attempt at a request, before it is redone elsewhere."""
    restarts: Natural = 3
    """How often one server may be started again (or awaited, when megarl did not start it) before it is given up."""
    concurrency: Positive = 256
    """Requests in flight per server."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What started servers run on; `auto` = CUDA where the trainer sees a GPU."""
    weight_transport: Literal["auto", "disk", "tensor", "distributed"] = "auto"
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
    local_max_sequences: Positive = 64
    """Sequences that one `local` engine decodes at a time."""
    timeout: Annotated[float, Field(gt=0)] = 3600.0
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
    """Train every token through the experts that it passed through in the rollout (mixture-of-experts models; SGLang
    and the embedded engine). Takes 2 bytes a token, layer and chosen expert in every learner rank's memory."""
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
    limit: Positive | None = None
    """Evaluate on the first N held-out problems only; default: all."""
