"""Lazy layers: the first input sets the number of channels."""

from __future__ import annotations

from torch.nn.modules.batchnorm import _LazyNormBase

from syncbn.nn.module import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d


class LazySyncBatchNorm1d(_LazyNormBase, SyncBatchNorm1d):
    """Becomes a :class:`SyncBatchNorm1d` in its first forward."""

    cls_to_become = SyncBatchNorm1d


class LazySyncBatchNorm2d(_LazyNormBase, SyncBatchNorm2d):
    """Becomes a :class:`SyncBatchNorm2d` in its first forward."""

    cls_to_become = SyncBatchNorm2d


class LazySyncBatchNorm3d(_LazyNormBase, SyncBatchNorm3d):
    """Becomes a :class:`SyncBatchNorm3d` in its first forward."""

    cls_to_become = SyncBatchNorm3d
