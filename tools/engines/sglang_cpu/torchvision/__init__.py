"""Stands in for torchvision, whose wheel does not load beside a CPU build of torch.

SGLang imports these names for its vision models; text models never call them. Anything called raises.
"""

from . import io, transforms

__version__ = "0.0.0+cpu"
__all__ = ["io", "transforms"]
