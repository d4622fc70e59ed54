"""The table of what the size of a store changes, from what `benchmarks.store_size` writes."""

from pydantic import BaseModel, ConfigDict

from deltaguard.evaluation.metrics.bootstrap import (
    RESAMPLES,
    Array,
    columns,
    interval,
    means,
    resampled_means,
)
from deltaguard.reports.records.base import Environment
from deltaguard.reports.table import Column, Table
from deltaguard.reports.text import percent, size
from tools.tables import made_with, small


class Finetune(BaseModel):
    """One fine-tune, before anything is restored.

    Attributes:
        name: of the protocol's fine-tune.
        seed: of its training.
        aligned: negative log-likelihood of each right answer under the aligned model, nats a token.
        finetuned: under the fine-tuned one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int
    aligned: tuple[float, ...]
    finetuned: tuple[float, ...]


class Restored(BaseModel):
    """One fine-tune restored with one store to one safety KL.

    Attributes:
        finetune: its name.
        seed: of its training.
        share: of the model's bytes that the store may take.
        iterated: whether its eigenpairs were found as by default, by iteration where matrices are large, and
            not chosen from all of them.
        rank_share: of the eigenpairs that it keeps.
        nbytes: what its eigenpairs take.
        limit: the safety KL that is looked for, nats per response token.
        safety_kl: the one found.
        nll: as in `Finetune`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    finetune: str
    seed: int
    share: float
    iterated: bool
    rank_share: float
    nbytes: int
    limit: float
    safety_kl: float
    nll: tuple[float, ...]


class StoreSizes(BaseModel):
    """`docs/results/store-size.json`.

    Attributes:
        environment: versions, machine and time.
        command: what produced it.
        reference: the share whose store, of exact eigenpairs, the others are compared with.
        finetunes: what was restored.
        rows: what came of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    environment: Environment
    command: str
    reference: float
    finetunes: tuple[Finetune, ...]
    rows: tuple[Restored, ...]


def store_size_table(content: str) -> str:
    """Draw a row for each fine-tune and store.

    Args:
        content: a `StoreSizes` as JSON.

    Returns:
        Markdown.
    """
    found = StoreSizes.model_validate_json(content)
    stores = sorted({(row.share, row.iterated) for row in found.rows}, key=lambda each: (-each[0], each[1]))
    limits = sorted({row.limit for row in found.rows})
    drawn = Table.of(
        "",
        [(tuned, *store) for tuned in found.finetunes for store in stores],
        (
            (Column("fine-tune", "name", code=True), lambda row: row[0].name),
            ("seed", lambda row: row[0].seed),
            ("store, of the\nmodel's bytes", lambda row: percent(row[1])),
            ("eigenpairs", lambda row: "by iteration" if row[2] else "exact"),
            ("their bytes", lambda row: size(_restored(found, *row, limits[0]).nbytes)),
            *((f"gain kept\nat {limit:g}", lambda row, at=limit: _cell(found, *row, at)) for limit in limits),
        ),
    ).markdown()
    how = (
        f"Share of the gain in likelihood of {len(found.finetunes[0].aligned)} right answers that is kept at "
        f"a measured safety KL; in brackets points beyond a store of {percent(found.reference)} with exact "
        "eigenpairs, with a 95 % interval over the answers. "
        f"`{found.command}`; {made_with(found.environment)}"
    )
    return f"{drawn}\n\n{small(how)}"


def _restored(found: StoreSizes, tuned: Finetune, share: float, iterated: bool, limit: float) -> Restored:
    own = (tuned.name, tuned.seed, share, iterated, limit)
    return next(
        row for row in found.rows if (row.finetune, row.seed, row.share, row.iterated, row.limit) == own
    )


def _cell(found: StoreSizes, tuned: Finetune, share: float, iterated: bool, limit: float) -> str:
    stores = ((share, iterated), (found.reference, False))
    own, other = (_restored(found, tuned, *each, limit).nll for each in stores)
    groups = columns(tuned.aligned, tuned.finetuned, own, other)
    kept, lead = _kept_and_lead(means(groups)[None])
    told = percent(float(kept[0]))
    if stores[0] == stores[1]:
        return told
    resampled = _kept_and_lead(resampled_means(groups, seed=0, resamples=RESAMPLES))[1]
    low, high = interval(float(lead[0]), resampled)
    return f"{told}\n({100 * lead[0]:+.1f}: {100 * low:+.1f} to {100 * high:+.1f})"


def _kept_and_lead(drawn: Array) -> tuple[Array, Array]:
    """Divide what is kept by the gain, and subtract the reference's share; of each row of four means."""
    aligned, finetuned, own, other = drawn.T
    gain = aligned - finetuned
    return (aligned - own) / gain, (other - own) / gain
