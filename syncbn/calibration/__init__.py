"""Population statistics of trained networks: :func:`recalibrate` and its report."""

from syncbn.calibration.recalibrate import recalibrate as recalibrate
from syncbn.calibration.report import CalibrationReport as CalibrationReport
