"""The v2 names of the same transforms."""

from .. import functional
from ..functional import InterpolationMode

__all__ = ["InterpolationMode", "functional"]


def __getattr__(name):
    return getattr(functional, name)
