"""`deltaguard calibrate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.table import Table

from deltaguard.cli.sink import (
    Int,
    Json,
    OptionalInt,
    OptionalPath,
    Output,
    Reference,
    checked,
    emit,
    hide_bars_of_transformers,
    progress_bar,
    warn,
)
from deltaguard.curvature import Rank

if TYPE_CHECKING:
    from deltaguard.curvature.store import CurvatureStore
    from deltaguard.reports.records.calibrate import CalibrationPlan


def calibrate(
    aligned: Reference,
    /,
    *,
    output: Output,
    prompts: OptionalPath = None,
    system: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = (),
    num_samples: Int = 128,
    num_look_alikes: OptionalInt = None,
    max_length: Int = 512,
    batch_size: Int = 16,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    rank: Rank = "auto",
    seed: Int = 0,
    memory: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Measure the aligned model's curvature on safety conversations, once for all its fine-tunes.

    Args:
        aligned: The aligned model: a folder, a Hub id, or `id@revision`.
        output: A new folder for the CurvatureStore.
        prompts: JSONL with `prompt` and optionally `response` and `system`, instead of the built-in set.
        system: A system prompt that the model is deployed with; may be repeated. Safety conversations are
            asked under it, too, later also what `restore` and `check` ask; lines of `--prompts` that name no
            `system` get these in turn.
        num_samples: Safety conversations that curvature is measured on; 64 more at most are held out for the
            dial.
        num_look_alikes: Harmless requests that look dangerous, calibrated on beside them; as many by default.
        max_length: Tokens of a conversation at most.
        batch_size: Conversations per batch.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        dtype: The model's arithmetic; `auto` is float32 on a CPU and the checkpoint's own elsewhere.
        rank: `auto` keeps as many eigenpairs as a quarter of the model's bytes hold; `full` keeps everything,
            which methods `greedy` and `published` need, and merging stores.
        seed: Which prompts are taken and held out, and their order.
        memory: What the model and the sums over its layers may take, such as `8GB`, half of the memory by
            default. A model that takes more is calibrated block by block, which takes a third more time.
        dry_run: Print what it would take, by part, from the headers and prompts alone; nothing is written.
        resume: Go on with what a calibration that was interrupted has kept.
        json: Print one JSON document and nothing else on stdout.
    """
    from deltaguard.curvature.calibrate import calibrate as run
    from deltaguard.curvature.request import CalibrateConfig
    from deltaguard.ranks import Ranks

    config = checked(
        CalibrateConfig,
        {
            "prompts": prompts,
            "systems": system,
            "num_samples": num_samples,
            "num_look_alikes": num_look_alikes,
            "max_length": max_length,
            "batch_size": batch_size,
            "device": device,
            "dtype": dtype,
            "rank": rank,
            "seed": seed,
            "memory": memory,
            "resume": resume,
        },
    )
    hide_bars_of_transformers()
    if dry_run:
        from deltaguard.curvature.dry_run import plan_calibration

        plan = plan_calibration(aligned, config=config, ranks=Ranks.current())
        emit(plan, _draw_plan(plan), as_json=json)
        return
    with progress_bar() as progress:
        store = run(aligned, output, config=config, progress=progress, ranks=Ranks.current())
    warn(store.provenance.warnings)
    emit(store.provenance, _draw(store, aligned, output), as_json=json)


def _draw_plan(plan: "CalibrationPlan") -> Table:
    from deltaguard.reports.text import size

    kept = "the largest block, and what is in none" if plan.by_blocks else "the model"
    in_blocks = (
        ("memory for hidden states", size(plan.hidden_bytes)),
        ("disk until the run ends", size(plan.disk_bytes)),
    )
    rows = (
        ("conversations", str(plan.conversations)),
        ("tokens at most", str(plan.tokens)),
        ("calibrated", "block by block" if plan.by_blocks else "as a whole"),
        ("weights and sums as a whole may take", size(plan.limit_bytes)),
        (f"memory while it answers ({plan.device})", size(plan.answering_bytes)),
        (f"memory for {kept}", size(plan.weights_bytes)),
        ("memory for sums", size(plan.sums_bytes)),
        ("memory for one batch, about", size(plan.pass_bytes)),
        ("memory for its predictions, about", size(plan.predicted_bytes)),
        *(in_blocks if plan.by_blocks else ()),
        ("store", "everything" if plan.store_bytes is None else f"at most about {size(plan.store_bytes)}"),
    )
    table = Table(title="Plan (nothing is written)", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _draw(store: "CurvatureStore", aligned: Reference, output: Path) -> Table:
    made = store.provenance
    table = Table(title=f"Curvature of {aligned}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    framed = f", {made.framed} in framings" if made.framed else ""
    table.add_row("harmful requests", f"{made.harmful}{framed}")
    if made.unanswered:
        table.add_row("of them without room for an answer", str(made.unanswered))
    table.add_row("harmless look-alikes", str(made.look_alikes))
    table.add_row("harmful requests held out", str(len(store.held_out)))
    table.add_row("tokens", f"{made.tokens}, {made.response_tokens} of responses")
    share = made.refusal_share
    refused = "not judged" if share is None else f"{share:.0%} of {made.judged}"
    table.add_row("harmful requests refused", refused)
    table.add_row("layers", str(sum(len(group.layers) for group in store.groups)))
    table.add_row("groups that share an input", str(len(store.groups)))
    table.add_row("eigenpairs kept", "all" if store.is_full else f"{made.rank_share:.0%}")
    table.add_row("matrices in blocks without curvature", str(len(made.uncovered)))
    table.add_row("store", str(output))
    return table
