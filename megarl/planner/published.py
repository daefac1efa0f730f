"""The sizes of a model to plan for: those of its folder, or, before it is there, those that were published."""

from __future__ import annotations

from pathlib import Path

from megarl.models import hub
from megarl.models.config_json import read_shape
from megarl.models.shape import ModelShape

PUBLISHED = Path(__file__).parents[2] / "examples" / "models"


def shape_of(path: Path) -> ModelShape:
    """The shape of the model in `path`. Where `path` does not exist, that of `examples/models/` of the same name, else
    that of the Hub's model.

    Raises UserError for a model that is in none of them.
    """
    published = PUBLISHED / path.name
    known = (published / "config.json").is_file() and not path.exists()
    return read_shape(published if known else hub.model(path, weights=False))
