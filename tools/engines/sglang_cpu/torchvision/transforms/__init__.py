"""Image transforms: names to import, and every call raises."""

from . import functional, v2
from .functional import InterpolationMode

__all__ = ["InterpolationMode", "functional", "v2"]


def __getattr__(name):
    return getattr(functional, name)
