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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaguard.chat.conversations import Conversation
    from deltaguard.curvature.calibrate import calibrate
    from deltaguard.curvature.request import CalibrateConfig
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.errors import DeltaguardError
    from deltaguard.evaluation.evaluate import evaluate
    from deltaguard.reports.records.check import CheckReport
    from deltaguard.reports.records.diff import DiffReport
    from deltaguard.reports.records.evaluation import EvaluationReport
    from deltaguard.reports.records.push import PushReport
    from deltaguard.reports.records.restore import RestoreReport, Verification
    from deltaguard.reports.records.sweep import SweepReport
    from deltaguard.restoration.check import check
    from deltaguard.restoration.diff import diff
    from deltaguard.restoration.options import RestoreConfig
    from deltaguard.restoration.push import push
    from deltaguard.restoration.restore import Restorer, restore
    from deltaguard.restoration.sweep import sweep
    from deltaguard.restoration.verify import verify

_HOME = {
    "CalibrateConfig": "curvature.request",
    "CheckReport": "reports.records.check",
    "Conversation": "chat.conversations",
    "CurvatureStore": "curvature.store",
    "DeltaguardError": "errors",
    "DiffReport": "reports.records.diff",
    "EvaluationReport": "reports.records.evaluation",
    "PushReport": "reports.records.push",
    "RestoreConfig": "restoration.options",
    "RestoreReport": "reports.records.restore",
    "Restorer": "restoration.restore",
    "SweepReport": "reports.records.sweep",
    "Verification": "reports.records.restore",
    "calibrate": "curvature.calibrate",
    "check": "restoration.check",
    "diff": "restoration.diff",
    "evaluate": "evaluation.evaluate",
    "push": "restoration.push",
    "restore": "restoration.restore",
    "sweep": "restoration.sweep",
    "verify": "restoration.verify",
}

__all__ = [
    "CalibrateConfig",
    "CheckReport",
    "Conversation",
    "CurvatureStore",
    "DeltaguardError",
    "DiffReport",
    "EvaluationReport",
    "PushReport",
    "RestoreConfig",
    "RestoreReport",
    "Restorer",
    "SweepReport",
    "Verification",
    "calibrate",
    "check",
    "diff",
    "evaluate",
    "push",
    "restore",
    "sweep",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # What reads metadata takes longer to import than all else here.
        from importlib.metadata import version

        return version("deltaguard")
    if name not in _HOME:
        raise AttributeError(f"module 'deltaguard' has no attribute {name!r}")
    return getattr(import_module(f"deltaguard.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
