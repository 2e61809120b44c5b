"""Fused contrastive losses and complete CLIP models: large batches in little memory.

No work happens at import and no device is probed.
"""

from vlmfast._version import __version__

__all__ = ["__version__"]
