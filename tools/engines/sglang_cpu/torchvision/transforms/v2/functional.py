"""The v2 functional names: the same refusals."""

from ..functional import InterpolationMode, __getattr__

__all__ = ["InterpolationMode", "__getattr__"]
