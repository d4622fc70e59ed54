"""The curvature of an aligned model, calibrated once and kept."""

import shutil
import time

from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.curvature.responses import OtherCalibrationError
from deltaguard.models.checkpoint import Checkpoint
from deltaguard.models.durable import InUseError, explained
from deltaguard.models.identity import identify
from deltaguard.restoration.job import default_store_folder, find_store
from deltaguard.restoration.options import RestoreConfig
from deltaguard.service.tasks import Calibrate, Outcome, Told
from deltaguard.service.worker import Tell


def calibrate_model(task: Calibrate, tell: Tell) -> Outcome:
    """Calibrate an aligned model into the cache, where a restore finds its store.

    Raises:
        DeltaguardError: as `calibrate`.
    """
    config = RestoreConfig(**task.restore)
    if not config.needs_curvature:
        return Outcome()
    source = Checkpoint.open(task.model)
    identity = identify(source)
    folder = default_store_folder(identity, config.rank)
    own = {
        "rank": config.rank,
        "device": task.device,
        "memory": config.memory,
        **task.options,
        "resume": True,
    }
    while find_store(source, identity, None, rank=config.rank) is None:
        tell(Told(once="calibrate", message="Calibrating the aligned model, once for all jobs."))
        try:
            calibrate(task.model, folder, config=CalibrateConfig.model_validate(own))
        except InUseError:
            # Another job's process is at it.
            time.sleep(1)
        except OtherCalibrationError as error:
            # Begun under other settings; a store that is finished meanwhile is found.
            if error.where != folder.resolve():
                with explained(error.where):
                    shutil.rmtree(error.where)
    return Outcome()
