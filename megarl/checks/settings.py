"""Settings against model and machine."""

from __future__ import annotations

from datetime import date
from typing import Any

import yaml

from megarl.algorithms import presets, steps
from megarl.checks import Mistakes
from megarl.config import Settings
from megarl.data.files import expand
from megarl.data.rendering import uses_clock
from megarl.errors import UserError
from megarl.learner import parallel, precision, router
from megarl.learner.schedule import learning_rate
from megarl.models import hub
from megarl.models.config_json import read_shape
from megarl.models.families import rules
from megarl.models.files.hf import HfWeights
from megarl.models.shape import ModelShape
from megarl.models.tokenizer import load_tokenizer
from megarl.rollout.detokenize import vocabulary_of
from megarl.rollout.early_exit import plan
from megarl.rollout.servers import factory
from megarl.run import atomic, trackers
from megarl.runtime import device

LOCAL_PARAMETERS = 2e9  # of a model that the embedded engine still decodes well on CUDA


def locate(settings: Settings) -> None:
    """Replace Hub ids, folders and patterns by files, in place, so that every rank reads the same. Raises UserError."""
    mistakes = Mistakes()
    with mistakes:
        settings.model.path = hub.model(settings.model.path, settings.model.weights == "pretrained")
    for name in ("train", "eval"):
        with mistakes:
            found = [file for each in getattr(settings.data, name) for file in hub.data(each, f"data.{name}")]
            setattr(settings.data, name, expand(found, f"data.{name}"))
    mistakes.answer()


def shape_of(settings: Settings) -> ModelShape:
    if not (settings.model.path / "config.json").is_file():
        raise UserError(f"model.path: {settings.model.path} has no config.json")
    return read_shape(settings.model.path)


def check(settings: Settings, world_size: int) -> ModelShape:
    """Everything that needs neither weights nor data. Returns the model's shape. Raises UserError, a line a mistake."""
    shape = shape_of(settings)
    rollout, budget = settings.rollout, settings.rollout.max_response_tokens
    mistakes = Mistakes()
    with mistakes:
        parallel.check(settings.parallel, shape)
        router.check(settings, shape)
    with mistakes:
        parallel.check_ranks(settings.parallel, world_size)
    with mistakes:
        precision.check(settings.precision)
        precision.check_layers(settings.precision, shape.layers, settings.parallel.pp)
    with mistakes:
        trackers.check(settings.trackers)
    with mistakes:
        presets.resolve(settings.algorithm, budget, settings.batch.updates_per_step)
    with mistakes:
        steps.check_shaping(settings.reward, budget)
    with mistakes:
        plan.check(rollout, load_tokenizer(settings.model.path))
    with mistakes:
        _check_ends(settings, shape)
    if rollout.engine in factory.ENGINES and not rollout.embedded and parallel.launch_info().rank == 0:
        with mistakes:
            factory.check(rollout, parallel.devices_here(world_size))
    mistakes.answer()
    return shape


def _check_ends(settings: Settings, shape: ModelShape) -> None:
    """A response must be able to end: the end-of-text tokens of tokenizer and generation_config.json exist."""
    tokenizer = load_tokenizer(settings.model.path)
    ids = vocabulary_of(tokenizer, settings.model.path).end_ids
    if not ids:
        raise UserError("model.path: neither the tokenizer nor generation_config.json names an end-of-text token")
    if not any(i < shape.vocab for i in ids):
        raise UserError(
            f"model.path: the end-of-text tokens {list(ids)} are beyond the model's vocabulary of {shape.vocab} "
            "(config.json: vocab_size)"
        )


def weights(settings: Settings, shape: ModelShape) -> str:
    """Where the first weights come from. Raises UserError unless the files have exactly the model's tensors."""
    if settings.model.weights == "random":
        return "drawn from the seed"
    files = HfWeights(settings.model.path)
    files.check(rules(shape))
    return f"{len(files.names)} tensors in {len(files.files())} files, each with its rule in the map"


def freeze_date(settings: Settings, resume: bool) -> None:
    """Set `data.template_date`, in place, if the chat template writes the date: the recorded one of a resumed run."""
    if settings.data.template_date or not uses_clock(load_tokenizer(settings.model.path), settings.data):
        return
    recorded = (_recorded(settings).get("data") or {}) if resume else {}
    today = date.today().isoformat()
    settings.data.template_date = date.fromisoformat(str(recorded.get("template_date") or today))


def notes(settings: Settings, resume: bool) -> list[str]:
    """What is allowed, and seldom meant."""
    o, updates = settings.optimizer, settings.batch.updates_per_step
    found, total = [], settings.steps * updates
    if o.warmup_steps > total:
        found.append(
            f"optimizer.warmup_steps: {o.warmup_steps} is more than the {total} updates of the run: the learning rate "
            f"ends at {learning_rate(total - 1, total, o):.3g}, below lr {o.lr:g}"
        )
    steps = _recorded(settings).get("steps") if resume else None
    if o.decay != "constant" and isinstance(steps, int) and steps != settings.steps:
        done = max(atomic.steps(settings.run / "checkpoints"), default=0) * updates
        before, now = learning_rate(done, steps * updates, o), learning_rate(done, total, o)
        found.append(
            f"steps: {settings.steps}, but the run was started with {steps}: the {o.decay} decay is stretched, and the "
            f"next learning rate is {now:.3g} instead of {before:.3g}"
        )
    if settings.rollout.embedded and device.on_cuda() and (size := shape_of(settings).parameters()) > LOCAL_PARAMETERS:
        found.append(
            f"rollout.engine: local, for a model of {size / 1e9:.1f}B parameters: it decodes without CUDA graphs "
            f"or paging and suits at most {LOCAL_PARAMETERS / 1e9:g}B; use sglang"
        )
    return found


def _recorded(settings: Settings) -> dict[str, Any]:
    """The settings in the run's folder; empty if there are none that can be read."""
    try:
        found = yaml.safe_load((settings.run / "config.yaml").read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
