"""Exact synchronized batch normalization for PyTorch.

Importing this package imports torch and nothing optional.
"""

from syncbn.calibration import CalibrationReport as CalibrationReport
from syncbn.calibration import recalibrate as recalibrate
from syncbn.distributed import RankInfo as RankInfo
from syncbn.distributed import init_process_group as init_process_group
from syncbn.fusion import Fusion as Fusion
from syncbn.fusion import fuse as fuse
from syncbn.inference import example_weighted as example_weighted
from syncbn.inference import prior_mix as prior_mix
from syncbn.nn.accumulation import accumulate_statistics as accumulate_statistics
from syncbn.nn.frozen_statistics import frozen_statistics as frozen_statistics
from syncbn.nn.merging import merge_over_ranks as merge_over_ranks
from syncbn.nn.merging import merge_statistics as merge_statistics
from syncbn.nn.module import SyncBatchNorm as SyncBatchNorm
from syncbn.nn.module import SyncBatchNorm1d as SyncBatchNorm1d
from syncbn.nn.module import SyncBatchNorm2d as SyncBatchNorm2d
from syncbn.nn.module import SyncBatchNorm3d as SyncBatchNorm3d
from syncbn.nn.module import convert_sync_batchnorm as convert_sync_batchnorm
from syncbn.nn.module import revert_sync_batchnorm as revert_sync_batchnorm
from syncbn.nn.running_norm import RunningNorm as RunningNorm
from syncbn.nn.uneven_data import JoinableModel as JoinableModel
from syncbn.nn.uneven_data import even_batches as even_batches
from syncbn.nn.uneven_data import global_mean as global_mean
from syncbn.ops.activation_checkpoint import checkpoint_contexts as checkpoint_contexts
from syncbn.ops.functional import sync_batch_norm as sync_batch_norm

__version__ = "0.1.0.dev0"

__all__ = [
    "CalibrationReport",
    "Fusion",
    "JoinableModel",
    "RankInfo",
    "RunningNorm",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "accumulate_statistics",
    "checkpoint_contexts",
    "convert_sync_batchnorm",
    "even_batches",
    "example_weighted",
    "frozen_statistics",
    "fuse",
    "global_mean",
    "init_process_group",
    "merge_over_ranks",
    "merge_statistics",
    "prior_mix",
    "recalibrate",
    "revert_sync_batchnorm",
    "sync_batch_norm",
]
