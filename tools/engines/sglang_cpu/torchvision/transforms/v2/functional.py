"""The v2 functional names: as in the first version, every call raises."""

from ..functional import InterpolationMode, __getattr__

__all__ = ["InterpolationMode", "__getattr__"]
