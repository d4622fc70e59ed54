"""`deltaguard verify`."""

from deltaguard.cli.sink import Json, Reference, emit
from deltaguard.errors import CheckFailedError


def verify(output: Reference, /, *, json: Json = False) -> None:
    """Check a restored checkpoint: index, shards, finite weights, and hashes against its report.

    Args:
        output: A folder that `deltaguard restore` wrote.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.restoration.verify import verify as check

    found = check(output)
    lines = [f"{output}: {found.tensors} tensors, {len(found.problems)} problems.", *found.unchecked]
    emit(found, "\n".join(lines), as_json=json)
    if not found.passed:
        raise CheckFailedError("\n".join(found.problems))
