"""`deltaguard restore`."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table

from deltaguard.cli.presets import Preset, merged, presets_help, read_options
from deltaguard.cli.sink import (
    Json,
    OptionalInt,
    OptionalPath,
    Output,
    Reference,
    UsageError,
    checked,
    emit,
    hide_bars_of_transformers,
    progress_bar,
    tell,
    warn,
)
from deltaguard.errors import listed
from deltaguard.methods import METHODS
from deltaguard.methods.method import ROLES, PricedMethod
from deltaguard.reports.records.restore import REPORT_NAME, PlanReport, RestoreReport
from deltaguard.restoration.options import ConfigFrom, OtherParams, OutputFormat, RestoreConfig, TrainingData

if TYPE_CHECKING:
    from deltaguard.restoration.restore import Restorer


def restore(
    aligned: Reference,
    finetuned: Reference,
    /,
    *others: Reference,
    output: Output,
    store: Reference | None = None,
    method: str | None = None,
    max_added_attack_success: float | None = None,
    training_data: TrainingData | None = None,
    prompts: OptionalPath = None,
    judge: OptionalPath = None,
    answer_tokens: OptionalInt = None,
    max_safety_kl: float | None = None,
    confidence: float | None = None,
    strength: float | None = None,
    refine: OptionalInt = None,
    other_params: OtherParams | None = None,
    config_from: ConfigFrom | None = None,
    output_format: OutputFormat | None = None,
    adapter_rank: OptionalInt = None,
    device: str | None = None,
    memory: str | None = None,
    config: Preset | Path | None = None,
    push: str | None = None,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    resume: Annotated[bool, Parameter(negative="")] = False,
    overwrite: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
    **own: str,
) -> None:
    """Write a checkpoint close to the aligned model where that refuses, and else to the fine-tuned one.

    Args:
        aligned: The model before fine-tuning: a folder, a Hub id, or `id@revision`.
        finetuned: The model after it: the same, or a PEFT LoRA adapter folder.
        others: More fine-tunes of the aligned model, which is then opened and loaded once for all. Each is
            restored into a folder of its own name in `--output`: that of its folder, or what follows the
            slash of its Hub id. Where one fails the others go on, and the exit code is 1.
        output: A new folder for the restored checkpoint; with several fine-tunes, the folder that holds one
            for each.
        store: The aligned model's curvature, from `deltaguard calibrate`; if not given, made once and cached.
        method: What decides how much of each layer is kept, one of those below; `kfac` by default.
        max_added_attack_success: The dial of methods with a price: keep as much as adds at most so many
            points to the aligned model's attack success, measured by asking held-out requests, nor more to
            its false refusals; 2 by default.
        training_data: With it, `unknown` (default): safety KL, which sees what asking does not, such as a
            backdoor, must be within 0.0006; or `trusted`: you know what it was fine-tuned on, 0.02.
        prompts: With it, JSONL with `prompt` and, optionally, `system`: harmful requests of your own to ask.
        judge: With it, a YAML file with the judge that decides, as in a suite of `deltaguard eval`, such as
            `kind: guard`, `template: llama-guard` and `model: FOLDER`; by default how an answer opens.
        answer_tokens: With it, such as 64: so many tokens of every answer are read, which shows answers that
            refuse first and then comply, and takes several times as long; by default the first sentence, or
            64 tokens where `--judge` names another judge.
        max_safety_kl: Instead of asking, keep as much as this safety KL, measured in nats per response token,
            allows, such as 0.0006; or beside `--max-added-attack-success`, in place of the limits above.
        confidence: With a limit on safety KL alone, such as 0.95: it must hold with this confidence, not on
            the mean alone.
        strength: How much is kept, larger keeps more; instead of the dial, or for methods without a price.
        refine: With the dial, such as 10: so many steps on the restored layers afterwards, towards the
            aligned model's refusals and the fine-tuned model's answers to harmless prompts. What breaks a
            limit is not kept. Needs the whole model in memory, with gradients.
        other_params: Where norms, biases and embeddings come from: `aligned` (default) or `finetuned`.
        config_from: Whose configuration, tokenizer and chat template the output has: `aligned` or
            `finetuned`; if not given, the two models must agree on them.
        output_format: `checkpoint` (default), or `adapter`: a PEFT LoRA adapter over the aligned model.
        adapter_rank: Rank of an adapter; if not given, for each layer the smallest that loses at most 1 % of
            its restored delta (squared norm).
        device: Where layers are solved and the dial runs the model: `auto`, `cpu`, `cuda` or `cuda:N`.
        memory: What the model that the dial measures may take of the device's memory, such as `8GB`; a larger
            one is measured block by block. And what projected layers may take between two prices, of which
            the rest waits on the disk. Half of it by default, and a quarter.
        config: A preset by its name, `careful` or `balanced` (below), or a YAML or JSON file with the method
            and its options; the command line wins.
        push: Afterwards upload the folder to this repository of the Hub, `owner/name`, made if absent; for a
            private one, or for several fine-tunes, there is `deltaguard push`.
        dry_run: Print the plan, made from headers alone, and write nothing; what speaks against the output
            folder is said.
        resume: Go on with a restore that was interrupted; one that is finished is left as it is, and of
            several fine-tunes the missing ones are restored.
        overwrite: Replace the files of an earlier restore, which its report in the output folder lists. All
            others stay and are named; where the new output needs the place of one, nothing is done.
        json: Print one JSON document and nothing else on stdout.
        **own: An option, or a model, of the method's own: see below.
    """
    given: dict[str, Any] = locals()
    options = {name: value for name, value in given.items() if name in RestoreConfig.model_fields}
    chosen = _chosen(config, options | {name.replace("-", "_"): value for name, value in own.items()})
    if push is not None:
        _check_push(push, several=bool(others), dry_run=dry_run)
        if chosen.output_format == "adapter":
            from deltaguard.models.hub import is_local
            from deltaguard.restoration.push import refuse_local_base

            if is_local(aligned):
                refuse_local_base(str(aligned))
    if others:
        from deltaguard.cli.restore_many import restore_many

        finetunes = [str(each) for each in (finetuned, *others)]
        restore_many(aligned, finetunes, output, store, chosen, dry_run=dry_run, as_json=json)
        return
    if dry_run:
        from deltaguard.restoration.dry_run import plan_restore

        plan = plan_restore(aligned, finetuned, output, store=store, config=chosen)
        emit(plan, _draw_plan(plan), as_json=json)
        return
    from deltaguard.ranks import Ranks
    from deltaguard.reports.restore import restore_table
    from deltaguard.restoration.restore import Restorer

    hide_bars_of_transformers()
    ranks = Ranks.current()
    with Restorer(aligned, store=store, config=chosen, ranks=ranks) as restorer:
        report = restore_one(restorer, finetuned, output)
    emit(report, restore_table(report), as_json=json, last=_next(report, chosen, output))
    if push is not None and ranks.leads:
        from deltaguard.restoration.push import push as upload

        tell(f"Pushed: {upload(output, push).commit}")
    # Where one process ends, torchrun may end the others.
    ranks.wait()


def restore_one(restorer: "Restorer", finetuned: Reference, output: Path) -> RestoreReport:
    """Restore a fine-tune, and tell people how it goes and what they must know.

    Raises:
        DeltaguardError: as `Restorer.restore`.
    """
    before = _report_file(output)
    with progress_bar() as progress:
        report = restorer.restore(finetuned, output, progress=progress)
    warn(report.warnings)
    _tell_what_was_left(output, report, nothing_done=before is not None and before == _report_file(output))
    return report


_PROGRAM_BYTES = 600_000_000
"""What torch and transformers take without a model."""


def restore_help() -> str:
    """List presets, and all methods with their options, for the end of a help page."""
    lines = [presets_help(), "", "Methods:", ""]
    for method in METHODS.values():
        strength = "dial or strength" if isinstance(method, PricedMethod) else "strength"
        lines.append(f"- `{method.name}` ({strength}): {method.title} ({method.reference})")
        for name, field in method.options.model_fields.items():
            lines.append(f"    - `--{name.replace('_', '-')}`: {field.description}")
        lines += [f"    - `--{role}`: {ROLES[role]}" for role in method.models]
    return "\n".join(lines)


def _check_push(repository: str, *, several: bool, dry_run: bool) -> None:
    """Refuse a push that cannot be, before the work."""
    if several or dry_run:
        reason = "a dry run writes nothing" if dry_run else "several fine-tunes have as many outputs"
        raise UsageError(f"--push uploads one restored model, and {reason}.")
    from deltaguard.restoration.push import require_login

    require_login(repository)


def _chosen(config: Preset | Path | None, given: dict[str, Any]) -> RestoreConfig:
    """Find the options of a preset or file, and over them those of the command line."""
    named = {name: value for name, value in given.items() if value is not None and value is not False}
    return checked(RestoreConfig, merged(read_options(config), named) if config else named)


def _next(report: RestoreReport, config: RestoreConfig, output: Path) -> str:
    models = shlex.join((report.aligned.reference, str(output)))
    return f"Restored {config.output_format}: {output}\nNext: deltaguard eval {models} -o evaluation"


def _report_file(output: Path) -> tuple[int, int] | None:
    """By what the report in a folder is known to be the same file as before, None where there is none."""
    try:
        found = (output / REPORT_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _tell_what_was_left(output: Path, report: RestoreReport, *, nothing_done: bool) -> None:
    from deltaguard.models.admission import unlisted

    if nothing_done:
        tell(f"There was nothing to do: {output} is the finished output of this job.")
    names = unlisted(output, [file.name for file in report.files])
    if names:
        tell(listed(f"Left in place in {output}, as no restore wrote it", names))


def _draw_plan(plan: PlanReport) -> Table:
    from deltaguard.reports.text import duration, size

    table = Table(title="Plan (nothing is written)", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("tensors restored", f"{plan.restored}")
    table.add_row("taken from the aligned model", f"{plan.from_aligned}")
    table.add_row("taken from the fine-tuned model", f"{plan.from_finetuned}")
    table.add_row("extended by fine-tuned rows", f"{plan.extended}")
    table.add_row("weights read at most", size(plan.read_bytes))
    table.add_row("curvature read", size(plan.curvature_bytes))
    table.add_row("weights written", size(plan.write_bytes))
    table.add_row("memory for a layer and the next", size(plan.peak_bytes))
    for name, value in _dial_rows(plan):
        table.add_row(name, value)
    if plan.kept_bytes:
        table.add_row("memory for prepared layers, at most", size(plan.kept_bytes))
    if plan.refine_bytes:
        table.add_row(f"memory for refining ({plan.device})", size(plan.refine_bytes))
    table.add_row("memory for program and libraries, about", size(_PROGRAM_BYTES))
    table.add_row("time for the arithmetic alone, about", duration(plan.seconds))
    if plan.note:
        table.add_row("note", plan.note)
    return table


def _dial_rows(plan: PlanReport) -> Iterator[tuple[str, str]]:
    """Say how the dial would measure, and what of memory that takes, by part."""
    from deltaguard.reports.text import size

    dial = plan.dial
    if dial is None:
        return
    way = f"block by block, prices a pass: {dial.at_once}" if dial.by_blocks else "as a whole"
    yield "the dial's model is measured", way
    yield "as a whole it may take", size(dial.limit_bytes)
    if dial.by_blocks:
        yield "memory for what is in no block", size(dial.ends_bytes)
        yield "memory for the largest block", size(dial.block_bytes)
        yield "memory for hidden states", size(dial.hidden_bytes)
        yield "memory for a block's weights at each price", size(dial.weights_bytes)
    yield f"memory for the dial ({plan.device})", size(plan.dial_bytes)
