"""The table of what the service withstands, from `docs/results/service.json`."""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Cell, Column, Table
from deltaguard.reports.text import DASH, duration
from tools.tables import made_with, small

Broken = Mapping[str, tuple[str, ...]]
"""What must be true, and where it was not: nowhere, where nothing follows."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    seed: int
    seconds: float
    broken: Broken


class Kills(_Part):
    """kill -9 of the service and of the processes of its jobs, over a queue of jobs.

    Attributes:
        environment: what it ran with.
        seed: of the moments, and of what was killed.
        jobs: that were sent.
        kills: of `server`, `trainer` (the process that trains) and `worker` (those of all other steps).
        interrupted: processes of steps that ended with a kill, that of the service included, by step.
        ended: jobs by their state, or by the code of their error.
        published: models that have a name.
        answered: of those, how many answer a chat.
        job_seconds: from a job's turn to its end, kills included; the median.
        seconds: wall time until the last job ended.
        broken: what must be true, and the jobs of which it was not.
    """

    jobs: int
    kills: Mapping[str, int]
    interrupted: Mapping[str, int]
    ended: Mapping[str, int]
    published: int
    answered: int
    job_seconds: float


class Route(BaseModel):
    """What many clients saw of one route.

    Attributes:
        name: the method and the path.
        statuses: requests by the status of their answer.
        p50, p95, p99: seconds until an answer that was no refusal was read whole.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    statuses: Mapping[int, int]
    p50: float | None
    p95: float | None
    p99: float | None


class Clients(_Part):
    """Many clients at once, each with its next request as soon as the last one is answered.

    Attributes:
        environment: what it ran with.
        seed: of what the clients ask.
        clients: at once.
        organisations: that they belong to.
        seconds: wall time.
        routes: what they asked.
        broken: what must be true, and the answers of which it was not.
    """

    clients: int
    organisations: int
    routes: tuple[Route, ...]


class Calls(_Part):
    """Requests made from the service's OpenAPI schema.

    Attributes:
        environment: what it ran with.
        seed: of the first round of requests.
        calls: all of them.
        operations: of the schema.
        statuses: answers by their status.
        seconds: wall time.
        broken: what must be true, and what was found instead.
    """

    calls: int
    operations: int
    statuses: Mapping[int, int]


class ServiceResults(BaseModel):
    """`docs/results/service.json`: parts that were measured so far."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kills: Kills | None = None
    clients: Clients | None = None
    calls: Calls | None = None


Line = tuple[str, str, str, tuple[float | None, float | None, float | None]]


def service_table(content: str) -> str:
    """Draw all that was measured: a row a part, and a row a route.

    Args:
        content: `ServiceResults` as JSON.

    Returns:
        Markdown.
    """
    found = ServiceResults.model_validate_json(content)
    parts = [part for part in (found.kills, found.clients, found.calls) if part is not None]
    lines = [
        *(_kills(found.kills) if found.kills else ()),
        *(_clients(found.clients) if found.clients else ()),
        *(_calls(found.calls) if found.calls else ()),
    ]
    drawn = Table.of(
        "",
        lines,
        (
            (Column("what", "words"), lambda line: line[0]),
            (Column("how often", "words"), lambda line: line[1]),
            (Column("what came of it", "words"), lambda line: line[2]),
            ("p50", lambda line: _time(line[3][0])),
            ("p95", lambda line: _time(line[3][1])),
            ("p99", lambda line: _time(line[3][2])),
        ),
    ).markdown()
    made = (
        f"{name}: seed {part.seed}, {duration(part.seconds)}; {made_with(part.environment)}"
        for name, part in (("Kills", found.kills), ("Clients", found.clients), ("Schema", found.calls))
        if part is not None
    )
    return "\n\n".join((drawn, _held(part.broken for part in parts), *map(small, made)))


_NONE = (None, None, None)


def _kills(part: Kills) -> list[Line]:
    kills = ", ".join(f"{count} of a {name}" for name, count in part.kills.items())
    ended = ", ".join(f"{count} {name}" for name, count in sorted(part.ended.items()))
    came = (
        f"{sum(part.ended.values())} ended ({ended}), {part.published} models published, {part.answered} of "
        f"them answer; {sum(part.interrupted.values())} steps were cut off and done again; "
        f"{duration(part.job_seconds)} a job in the median"
    )
    what = f"kill -9 over a queue of {part.jobs} jobs"
    return [(what, f"{sum(part.kills.values())} ({kills})", came, _NONE)]


def _clients(part: Clients) -> list[Line]:
    who = f"{part.clients} clients at once: "
    return [
        (
            f"{who}{route.name}",
            f"{sum(route.statuses.values()):,}",
            _statuses(route.statuses),
            (route.p50, route.p95, route.p99),
        )
        for route in part.routes
    ]


def _calls(part: Calls) -> list[Line]:
    what = f"calls made from the OpenAPI schema, of {part.operations} operations"
    return [(what, f"{part.calls:,}", _statuses(part.statuses), _NONE)]


def _statuses(found: Mapping[int, int]) -> str:
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(found.items()))


def _held(found: Iterable[Broken]) -> str:
    """Say what was looked at, and whether it was true."""
    looked: dict[str, list[str]] = {}
    for broken in found:
        for name, places in broken.items():
            looked.setdefault(name, []).extend(places)
    failed = [f"{name}: {'; '.join(places[:3])}" for name, places in looked.items() if places]
    if failed:
        return f"**Not all held.** {' '.join(failed)}"
    return f"All held: {', '.join(looked)}."


def _time(seconds: float | None) -> Cell:
    if seconds is None:
        return Cell(DASH)
    return Cell(duration(seconds) if seconds >= 1 else f"{1000 * seconds:.0f} ms")
