"""Give a fine-tuned language model its refusals back.

The public API is loaded on first use, so importing `deltaguard` does not import torch.

Example:
    ```python
    import deltaguard

    store = deltaguard.calibrate("aligned-model", "store")
    report = deltaguard.restore("aligned-model", "finetuned-model", "restored", store=store)
    ```
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaguard.calibration.calibrate import CalibrateConfig, calibrate
    from deltaguard.calibration.conversations import Conversation
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.errors import DeltaguardError
    from deltaguard.evaluation.evaluate import evaluate
    from deltaguard.report.diff import DiffReport
    from deltaguard.report.evaluation import EvaluationReport
    from deltaguard.report.restore import RestoreReport, Verification
    from deltaguard.report.sweep import SweepReport
    from deltaguard.restoration.diff import diff
    from deltaguard.restoration.options import RestoreConfig
    from deltaguard.restoration.restore import restore
    from deltaguard.restoration.sweep import sweep
    from deltaguard.restoration.verify import verify

__version__ = version("deltaguard")

_HOME = {
    "CalibrateConfig": "calibration.calibrate",
    "Conversation": "calibration.conversations",
    "CurvatureStore": "curvature.store",
    "DeltaguardError": "errors",
    "DiffReport": "report.diff",
    "EvaluationReport": "report.evaluation",
    "RestoreConfig": "restoration.options",
    "RestoreReport": "report.restore",
    "SweepReport": "report.sweep",
    "Verification": "report.restore",
    "calibrate": "calibration.calibrate",
    "diff": "restoration.diff",
    "evaluate": "evaluation.evaluate",
    "restore": "restoration.restore",
    "sweep": "restoration.sweep",
    "verify": "restoration.verify",
}

__all__ = [
    "CalibrateConfig",
    "Conversation",
    "CurvatureStore",
    "DeltaguardError",
    "DiffReport",
    "EvaluationReport",
    "RestoreConfig",
    "RestoreReport",
    "SweepReport",
    "Verification",
    "calibrate",
    "diff",
    "evaluate",
    "restore",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'deltaguard' has no attribute {name!r}")
    return getattr(import_module(f"deltaguard.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
