"""A service whose steps take a moment and learn nothing: `stub_service.py DATA PORT [DATABASE_URL]`.

Everything but what the processes of jobs do is as it is served, so that outages of the database can be tried.
"""

import sys
import time
from pathlib import Path

import uvicorn

from deltaguard.service import database, workflow
from deltaguard.service.app import make_app
from deltaguard.service.executors.local import LocalExecutor
from deltaguard.service.inference import Inference
from deltaguard.service.process import StoppedError
from deltaguard.service.server import open_service
from deltaguard.service.settings import Limits, Settings
from deltaguard.service.taking_up import take_up
from deltaguard.service.tasks import RESTORED, Outcome, Told

LINES, LINE_S = 5, 0.1


def run_task(task, folder, *, executor, cache, tell, may_go_on):
    """Tell a few lines, as a process would that is begun again from its beginning."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(LINES):
        tell(Told(once=f"{task.kind} {number}", message=f"{task.kind}, line {number}"))
        if not may_go_on():
            raise StoppedError("The job is not to go on.")
        time.sleep(LINE_S)
    outcome = Outcome(data={"steps": 3, "trained_tokens": 10} if task.kind == "train" else {})
    (folder / f"{task.kind}.outcome.json").write_text(outcome.model_dump_json())
    if task.kind == "restore":
        (folder / RESTORED).mkdir(exist_ok=True)
    return outcome


def main(data, port, url=None):
    """Serve until the process is killed."""
    # Shorter than an outage, and longer than a slow disk's turn.
    database._WAIT_MS, workflow.run_task = 300, run_task
    # Tests ask often, and how often is not what they test.
    limits = Limits(requests_per_minute=10**6)
    settings = Settings(models={"tiny": "nowhere"}, database_url=url, limits=limits)
    opened = open_service(Path(data), settings)
    sys.stdout.write(f"{opened.first_key}\n")
    sys.stdout.flush()
    workflows = workflow.launch(opened.service, opened.database_url, LocalExecutor())
    take_up(workflows)
    inference = Inference(Path(data) / "chat.log", device="cpu", most_waiting=1)
    uvicorn.run(make_app(opened.service, workflows, inference), port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
