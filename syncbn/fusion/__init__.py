"""Fusion of ReLUs and residual additions into the synchronized layers of a model."""

from syncbn.fusion.fusion_pass import Fusion as Fusion
from syncbn.fusion.fusion_pass import fuse as fuse
