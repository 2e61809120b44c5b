"""The losses as modules. The Clip, SigLip, CoCa and DistillClip ones take the place of open_clip's."""

from vlmfast.losses.clip import ClipLoss
from vlmfast.losses.coca import CoCaLoss
from vlmfast.losses.distill import DistillClipLoss
from vlmfast.losses.info_nce import InfoNceLoss
from vlmfast.losses.siglip import SigLipLoss
from vlmfast.losses.vse import VseLoss

__all__ = ["ClipLoss", "CoCaLoss", "DistillClipLoss", "InfoNceLoss", "SigLipLoss", "VseLoss"]
