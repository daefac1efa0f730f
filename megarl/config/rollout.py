"""Settings of rollouts: engines, early exit, and the sampling of evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from megarl.config.section import Fraction, Natural, Place, Positive, Seconds, Section


class EarlyExit(Section):
    """Step-GRPO's early exit (arXiv 2604.16890); the defaults are the paper's. See rollout/early_exit."""

    enabled: bool = False
    """Probe at step markers and end the thought once a probe is confident. Only training rollouts do this, never
    evaluation."""
    markers: list[str] = ["Wait"]
    """Stand-alone words that begin a new reasoning step. Early exit probes at them, and the step-aware reward counts
    them."""
    think_end: str = "</think>"
    """Text that ends the thought. It may be one token or several."""
    inducer: str | None = None
    """Text added after the finished steps to ask for a trial answer. Default: the variant's."""
    closing: str = "\n</think>\n\n"
    """Text inserted when a thought ends early or runs out of budget."""
    probe_tokens: Annotated[int, Field(ge=2)] = 20
    """Longest trial answer, in tokens. Raise it if answers are long."""
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Exit when the confidence is above this. Lower values exit more often."""
    strict: bool = True
    """Give confidence 0 to a trial answer that does not end with `think_end`."""
    averaging: Literal["geometric", "arithmetic"] = "geometric"
    """Mean over the probabilities of the trial's tokens, without the first. DEER (arXiv 2504.15895) uses `arithmetic`
    for R1-distilled models."""
    reject_early: bool = True
    """Stop a probe once its confidence can no longer reach the threshold. The exits are the same, for fewer tokens.
    Only for `engine: local` and geometric averaging."""
    probe_temperature: Annotated[float, Field(ge=0.0, le=100)] = 0.0
    """Temperature of trial answers. 0 is greedy, as in the released code. DEER uses 1."""
    thinking_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    """Share of the response budget that the thought may use."""
    near_budget: Natural = 50
    """At a marker with at most this many thinking tokens left, exit without a probe."""
    max_probes: Natural = 10
    """Stop probing a completion after this many probes that did not exit."""
    repetition_limit: Positive = 3
    """End the thought when this many steps repeat the words of the step before."""
    exit_fraction: Fraction = 1.0
    """Share of each group that may exit early. The rest is generated plainly, for comparison."""
    schedule: Literal["blocking", "speculative"] = "blocking"
    """`blocking` waits for each probe. `speculative` keeps thinking during the probe and aborts the loser."""
    variant: Literal["released", "paper_text"] = "released"
    """What follows a probe. `released` asks with "\\n**Final Answer**\\n\\\\boxed", discards the trial answer and
    samples an answer. `paper_text` asks with "</think> The final answer is" and keeps the trial answer."""

    @field_validator("markers")
    @classmethod
    def _can_mark(cls, markers: list[str]) -> list[str]:
        if not markers or not all(marker.strip() for marker in markers):
            raise ValueError("needs at least one marker, none of them blank; the paper's is ['Wait']")
        return markers

    @property
    def trial_inducer(self) -> str:
        """The inducer, with the variant's default filled in."""
        if self.inducer is not None:
            return self.inducer
        return "\n**Final Answer**\n\\boxed" if self.variant == "released" else "</think> The final answer is"


class Servers(Section):
    """Engine servers (SGLang, vLLM, or `megarl serve`): started by megarl, or already running."""

    count: Positive = 1
    """Servers to start on this machine."""
    addresses: list[str] = []
    """`http://host:port` of running servers. If empty, megarl starts `count` servers."""
    python: Place | None = None
    """Python interpreter of the engine's environment. Default: `.engines/<engine>/bin/python`."""
    flags: list[str] = []
    """Further arguments of the server, one list item per word."""
    api_key_env: str | None = None
    """Environment variable with the API key. The key is never logged. Without one, the servers that megarl starts get a
    random key."""
    api_key_file: Place | None = None
    """File with the API key, instead of `api_key_env`. Only its owner may read it (mode 600)."""
    start_timeout: Seconds = 600.0
    """Seconds for a server to become healthy."""
    request_timeout: Seconds = 1800.0
    """Seconds for one request, retries included."""
    attempt_timeout: Seconds = 900.0
    """Seconds for one attempt at a request. After that another server gets it."""
    restarts: Natural = 3
    """Maximum restarts per server. For servers that megarl did not start: maximum reconnects."""
    concurrency: Positive = 256
    """Maximum requests in flight per server."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of started servers. `auto` is CUDA if the trainer sees a GPU."""
    devices: list[int] = []
    """CUDA devices of the servers that megarl starts, counted from 0 among the visible ones. Default: those that follow
    the devices of the learner's ranks."""
    deterministic: bool = False
    """Start SGLang with `--enable-deterministic-inference`: equal seeds then draw equal tokens. It needs CUDA, and
    generates more slowly. Without it, SGLang ignores seeds."""
    weight_transport: Literal["auto", "disk", "tensor", "distributed"] = "auto"
    """How weights reach the servers. `auto` takes the fastest way that works here."""
    broadcast_address: str | None = None
    """Address of the controller's host that servers dial for the broadcast of `distributed`. Default: the one from
    which this host reaches them."""


class Rollout(Section):
    """How responses are generated for training."""

    engine: Literal["local", "sglang", "vllm"] = "local"
    """`local` runs inside the learner ranks and suits small models. `sglang` and `vllm` run as servers. With
    `servers.addresses`, `local` is a server too."""
    max_response_tokens: Positive = 16384
    """Response budget in tokens, thought and answer together."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Sampling temperature of training rollouts. Training log-probs use it too."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus of training rollouts. Keep 1, so that training sees the distribution that was sampled."""
    top_k: Natural = 0
    """Sample from the k likeliest tokens. 0 means all."""
    local_max_sequences: Positive = 64
    """Sequences that one `local` engine decodes at once. Lower it to save memory."""
    timeout: Seconds = 3600.0
    """Seconds for the rollouts of one step."""
    partial: bool = False
    """Let unfinished completions continue under new weights after an update. Each span of tokens keeps its weight
    version. It needs `async_steps`."""
    mismatch_limit: Annotated[float, Field(gt=0)] = 0.5
    """Stop the run when the mean |train - rollout| log-prob of a step exceeds this. With `async_steps` it includes the
    policy's drift."""
    canary_limit: Annotated[float, Field(gt=0)] | None = None
    """Stop the run when a canary token's log-probs in engine and learner differ by more nats than this after a weight
    sync. Below -1 nat the limit grows with the log-prob. Default: three times what the model's own rounding explains,
    measured at every sync."""
    replay_routing: bool = False
    """Train each token through the experts that it used in the rollout. For mixture-of-experts models on `sglang` or
    the embedded engine. It takes 2 bytes per token, layer and chosen expert."""
    early_exit: EarlyExit = EarlyExit()
    servers: Servers = Servers()

    @property
    def embedded(self) -> bool:
        """Whether every learner rank has its own engine."""
        return self.engine == "local" and not self.servers.addresses


class Evaluation(Section):
    """Accuracy and length on `data.eval`, by plain generation."""

    every: Natural = 20
    """Steps between evaluations. With 0, only before the first and after the last step."""
    temperature: Annotated[float, Field(ge=0.0, le=100)] = 0.6
    """Sampling temperature. 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Nucleus; 1 means all tokens."""
    samples: Positive = 1
    """Completions per held-out problem. Raise it when the held-out set is small."""
    max_response_tokens: Positive | None = None
    """Response budget in tokens. Default: `rollout.max_response_tokens`."""
    limit: Positive | None = None
    """Evaluate on the first N held-out problems only. Default: all."""
