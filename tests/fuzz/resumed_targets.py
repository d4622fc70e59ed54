"""What an interrupted run left for the next one: journals, requests, answers, scores and times."""

import json
import shutil
from pathlib import Path

from mutators import Mutator, damage_json, damage_lines

import models
from copies import stop_in_shard, three_shards, write_all
from deltaguard.curvature.calibrate import calibrate
from deltaguard.curvature.request import CalibrateConfig
from deltaguard.evaluation.asking import _SCHEMAS
from deltaguard.evaluation.journal import AnswerFile, Clock
from deltaguard.evaluation.judges.llm import LLMJudge
from deltaguard.evaluation.server import Server
from deltaguard.progress import Event
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, RestoreConfig
from deltaguard.restoration.restore import restore
from pairs import CONVERSATIONS, pair
from targets import Kind, Target, in_file

RESUMED = CalibrateConfig(max_new_tokens=2, device="cpu", resume=True)


class StopError(Exception):
    """Ends a run in the middle."""


def journal_of(folder: Path) -> Path:
    """The file in which a writer notes what it finished, whatever its name."""
    return next(path for path in folder.rglob("*.jsonl") if path.is_file())


def put_back(kept: Path, used: Path) -> None:
    shutil.rmtree(used, ignore_errors=True)
    shutil.copytree(kept, used)


def journal(folder: Path) -> Target:
    source = three_shards(folder / "source")
    out, kept = folder / "out", folder / "kept"
    stop_in_shard(source, out, 2)
    shutil.copytree(out, kept)
    path = journal_of(out)

    def read(content: bytes) -> None:
        put_back(kept, out)
        path.write_bytes(content)
        write_all(source, out, resume=True)

    return Target(path.read_bytes(), damage_lines, read)


def restored(folder: Path) -> Target:
    made = pair("llama", max_shard_size="60KB")
    out, kept = folder / "out", folder / "kept"
    config = RestoreConfig(max_safety_kl=DEFAULT_MAX_SAFETY_KL, device="cpu", resume=True)

    def stop(event: Event) -> None:
        if event.stage == "restore" and event.done > 5:
            raise StopError

    try:
        restore(made.aligned, made.finetuned, out, store=made.store, config=config, progress=stop)
    except StopError:
        shutil.copytree(out, kept)
    path = journal_of(out)

    def read(content: bytes) -> None:
        put_back(kept, out)
        path.write_bytes(content)
        restore(made.aligned, made.finetuned, out, store=made.store, config=config)

    return Target(path.read_bytes(), damage_lines, read)


def calibration(name: str, damage: Mutator):
    """A file of a calibration that was stopped before its store was written."""

    def make(folder: Path) -> Target:
        aligned = models.save(models.tiny_model("llama", num_hidden_layers=1), folder / "aligned")
        partial, kept, asked = folder / "store.partial", folder / "kept", folder / "prompts.jsonl"
        asked.write_text("\n".join(json.dumps({"prompt": each.prompt}) for each in CONVERSATIONS[:6]))
        config = RESUMED.model_copy(update={"prompts": asked})

        def run(progress=None) -> None:
            calibrate(aligned, folder / "store", config=config, progress=progress)

        def stop(event: Event) -> None:
            if event.stage == "decompose":
                raise StopError

        try:
            run(stop)
        except StopError:
            shutil.copytree(partial, kept)
        path = partial / name

        def read(content: bytes) -> None:
            shutil.rmtree(folder / "store", ignore_errors=True)
            put_back(kept, partial)
            path.write_bytes(content)
            run()

        return Target(path.read_bytes(), damage, read)

    return make


def answers(folder: Path) -> Target:
    path, prompts = folder / "answers.jsonl", ("How?", "Why?", "When?")
    made_by = {"model": "a" * 64, "suite": "b", "decoding": {"seed": 0}}
    AnswerFile(path, prompts=prompts, made_by=made_by).add([0, 2], ["So.", "Now."])

    def read() -> None:
        opened = AnswerFile(path, prompts=prompts, made_by=made_by)
        opened.add(opened.missing, ["Because."] * len(opened.missing))
        assert all(isinstance(value, str) for value in opened.in_order())
        opened.sort()

    return in_file(path, damage_lines, read)


def likelihoods(folder: Path) -> Target:
    path, prompts = folder / "general.likelihood.jsonl", ("How?", "Why?")
    schema = _SCHEMAS["likelihood"]
    AnswerFile(path, prompts=prompts, made_by={}, schema=schema).add([0, 1], [1.5, 2.0])

    def read() -> None:
        found = AnswerFile(path, prompts=prompts, made_by={}, schema=schema)
        assert all(isinstance(value, float) for value in found.values.values())

    return in_file(path, damage_lines, read)


def second_answers(folder: Path) -> Target:
    path, prompts = folder / "talk.follow-ups.jsonl", ("And then?", "Why?")
    schema, said = _SCHEMAS["follow-ups"], {"after": "So.", "answer": "Thus."}
    AnswerFile(path, prompts=prompts, made_by={}, schema=schema).add([0, 1], [said, said])

    def read() -> None:
        found = AnswerFile(path, prompts=prompts, made_by={}, schema=schema)
        assert all(isinstance(text, str) for value in found.values.values() for text in value.values())
        found.sort()

    return in_file(path, damage_lines, read)


def judged(folder: Path) -> Target:
    path = folder / "scores.jsonl"
    server = Server("http://127.0.0.1:1/v1", "m")
    LLMJudge(server, cache=path)._journal.append([{"key": "a", "score": 1}, {"key": "b", "score": 5}])

    def read() -> None:
        opened = LLMJudge(server, cache=path)
        assert all(score in range(1, 6) for score in opened._scores.values())
        opened._journal.append([{"key": "c", "score": 3}])

    return in_file(path, damage_lines, read)


def seconds(folder: Path) -> Target:
    path = folder / "seconds.json"

    def read() -> None:
        with Clock(path).timed("judges"):
            pass
        json.loads(path.read_text(), parse_constant=float.fromhex)

    return in_file(path, damage_json, read, b'{"answers": 1.5, "judges": 2}')


KINDS = (
    Kind("journal of a writer", 80, journal),
    Kind("journal of a restore", 10, restored),
    Kind("request of a calibration", 20, calibration("request.json", damage_json)),
    Kind("responses of a calibration", 10, calibration("responses.jsonl", damage_lines)),
    Kind("answers to look-alikes", 10, calibration("look-alikes.jsonl", damage_lines)),
    Kind("answers of an evaluation", 100, answers),
    Kind("likelihoods of an evaluation", 40, likelihoods),
    Kind("second answers of an evaluation", 40, second_answers),
    Kind("scores of a judge", 80, judged),
    Kind("seconds of an evaluation", 60, seconds),
)
