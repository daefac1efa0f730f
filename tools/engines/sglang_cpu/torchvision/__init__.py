"""Replaces torchvision, whose wheel does not load with a CPU build of torch.

SGLang imports these names for its vision models, and text models never call them. Every call raises.
"""

from . import io, transforms

__version__ = "0.0.0+cpu"
__all__ = ["io", "transforms"]
