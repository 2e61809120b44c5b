"""The losses as modules. `ClipLoss` and `SigLipLoss` take the place of open_clip's, with its arguments and results."""

from vlmfast.losses.clip import ClipLoss
from vlmfast.losses.info_nce import InfoNceLoss
from vlmfast.losses.siglip import SigLipLoss
from vlmfast.losses.vse import VseLoss

__all__ = ["ClipLoss", "InfoNceLoss", "SigLipLoss", "VseLoss"]
