"""The requests of the embedded engine's server as JSON: their fields, types and ranges.

What depends on the model (token ids, lengths) is checked by the engine itself.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from megarl.errors import UserError
from megarl.rollout.engine import Sampling

MAX_STOPS = 128  # of one kind in a request
TOO_LONG = 80  # characters of a wrong value that an error shows

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Field(min_length=1, max_length=256)]
Text = Annotated[str, Field(min_length=1, max_length=256)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]

T = TypeVar("T", bound="Body")


def _short(text: str) -> str:
    return text if len(text) <= TOO_LONG else text[:TOO_LONG] + "…"


def _not_tiny(temperature: float) -> float:
    """Float32 logits divided by it must stay finite."""
    if 0 < temperature < 1e-6:
        raise ValueError("must be 0, or at least 1e-6")
    return temperature


class Body(BaseModel):
    """JSON with these fields and no others. Types are not converted, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls: type[T], text: bytes) -> T:
        """Raises UserError naming the first wrong field, its value, and what is valid."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            first = e.errors(include_url=False, include_context=False)[0]
        field = ".".join(ascii(part).strip("'") for part in first["loc"]) or "body"
        raise UserError(f"{_short(field)}: {_short(ascii(first['input']))}: {first['msg']}")


_LIMITS: dict[str, Any] = {  # of `Sampling`'s fields; the others have their type alone
    "max_tokens": Annotated[int, Field(ge=1, lt=2**31)],
    "temperature": Annotated[float, Field(ge=0, le=1e6), AfterValidator(_not_tiny)],
    "top_p": Annotated[float, Field(ge=1e-6, le=1)],
    "top_k": Annotated[int, Field(ge=0, lt=2**31)],
    "seed": Annotated[int, Field(ge=0, lt=2**64)],
    "offset": Annotated[int, Field(ge=0, lt=2**31)],
    "stop_token_ids": Annotated[tuple[TokenId, ...], Field(max_length=MAX_STOPS)],
    "stop_sequences": Annotated[tuple[TokenIds, ...], Field(max_length=MAX_STOPS)],
    "stop_words": Annotated[tuple[Text, ...], Field(max_length=MAX_STOPS)],
    "stop_texts": Annotated[tuple[Text, ...], Field(max_length=MAX_STOPS)],
}
_FIELDS: dict[str, Any] = {
    name: (_LIMITS.get(name, kind), Sampling._field_defaults.get(name, ...))
    for name, kind in get_type_hints(Sampling).items()
}
SamplingBody = create_model("SamplingBody", __base__=Body, **_FIELDS)


class GenerateBody(Body):
    id: Name
    token_ids: list[TokenId]
    sampling: SamplingBody  # type: ignore[valid-type]

    def to_sampling(self) -> Sampling:
        return Sampling(**dict(self.sampling))


class ScoreBody(Body):
    token_ids: list[TokenId]


class AbortBody(Body):
    """`id` null: all requests."""

    id: Name | None


class LoadBody(Body):
    """`version`: any label. The answers to later requests repeat it."""

    version: Name
    folder: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"\A/[^\x00]*\z")]
