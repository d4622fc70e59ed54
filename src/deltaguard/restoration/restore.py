"""Restore a fine-tuned checkpoint: plan from headers, solve layer by layer, write shard by shard."""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter

from deltaguard.curvature.store import CurvatureStore
from deltaguard.device import enough_memory, exact_products, find_device
from deltaguard.errors import DeltaguardError
from deltaguard.files import expanded
from deltaguard.memory import peak_memory_bytes
from deltaguard.models.adapter import AdapterCheckpoint
from deltaguard.models.adapter_writer import AdapterLayer, EmptyAdapterError, commit_adapter, stage_adapter
from deltaguard.models.mirror import adapter_files, checkpoint_files
from deltaguard.models.writer import CheckpointWriter
from deltaguard.progress import Event, Progress, ignore
from deltaguard.ranks import Ranks
from deltaguard.reports.card import model_card
from deltaguard.reports.records.restore import (
    CARD_NAME,
    REPORT_NAME,
    FileRow,
    LayerRow,
    OtherRow,
    RestoreReport,
)
from deltaguard.restoration.aligned import AlignedInputs
from deltaguard.restoration.beforehand import require_restorable
from deltaguard.restoration.dial import Price, find_price
from deltaguard.restoration.job import Job
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.output import (
    Output,
    describe_output,
    finished_report,
    open_writer,
    refuse_output,
)
from deltaguard.restoration.refine import Refined, refined_layers
from deltaguard.restoration.resident import Resident
from deltaguard.restoration.shared import open_trial, own_trial, serve
from deltaguard.restoration.summary import summarise
from deltaguard.restoration.trial import Trial
from deltaguard.restoration.writing import write_files
from deltaguard.solvers.profile import PROHIBITIVE

T = TypeVar("T")
_PRICE = TypeAdapter(Price)
_UNCOMPARED = (
    "No store was at hand, and a finished output needs none: whether it is by another calibration than the "
    "default one was not looked at."
)


class UnchangedError(DeltaguardError):
    """The output would be the fine-tuned model itself."""


class Restorer:
    """Restores one fine-tune of an aligned model after another.

    The aligned model and the store are opened once. The model that the dial measures is loaded once, with
    what the aligned model predicts and answers, and stays in memory until the block ends: it serves every
    fine-tune that has the aligned model's tensors, and the configuration, tokenizer and chat template of the
    one before. For any other, and with `refine`, it is loaded anew; where it does not fit into memory, each
    fine-tune has its blocks read anew. The outputs are those of separate runs.

    Args:
        aligned: as in `restore`, like `store` and `config`.
        store: the aligned model's curvature; calibrated for the first fine-tune where it is absent.
        config: the options of every restore.
        ranks: the processes that share the work, all of which do the same; by default this one alone.

    Raises:
        DeltaguardError: the aligned model cannot be used.

    Example:
        ```python
        with Restorer("Qwen/Qwen3-0.6B", store="./store") as restorer:
            for name in ("one", "two"):
                report = restorer.restore(f"./finetunes/{name}", f"./restored/{name}")
                print(name, report.kept_energy)
        ```
    """

    def __init__(
        self,
        aligned: str | Path,
        *,
        store: CurvatureStore | str | Path | None = None,
        config: RestoreConfig | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Open the aligned model; nothing is loaded yet."""
        self._config = config or RestoreConfig()
        self._ranks = ranks.on(find_device(self._config.device)) if ranks else Ranks()
        self._inputs = AlignedInputs.open(aligned, store=store, config=self._config)
        self._resident = Resident()

    def __enter__(self) -> Self:
        """Begin; what is loaded stays in memory."""
        return self

    def __exit__(self, *_: object) -> None:
        """End; what was loaded is given up."""
        self._resident.release()

    @exact_products()
    @enough_memory("let less wait between two prices (`--memory`), or take another device (`--device cpu`)")
    def restore(
        self, finetuned: str | Path, output_dir: str | Path, *, progress: Progress | None = None
    ) -> RestoreReport:
        """Restore one fine-tune; one that fails leaves the next ones as they are.

        Of several processes that share the work none can go on once one of them failed.

        Args:
            finetuned: as in `deltaguard.restore`, like `output_dir` and `progress`.
            output_dir: a folder of its own for each fine-tune.
            progress: called after each tensor.

        Returns:
            As `deltaguard.restore`; seconds are those of this fine-tune.

        Raises:
            DeltaguardError: as `deltaguard.restore`; an aligned model or store that was changed since it was
                opened is refused.
        """
        started, memory, config = time.perf_counter(), peak_memory_bytes(), self._config
        ranks = self._ranks
        job = self._inputs.look(finetuned)
        # Before anything that all of them do only where there is none.
        self._inputs.require_one_mind(job, ranks)
        if job.store is None and config.needs_curvature:
            # Before hours of calibrating, not after.
            plan = job.plan(config)
            require_restorable(job, plan, config)
            output = describe_output(job, plan, expanded(output_dir), config)
            finished = None
            # It locks the folder for a moment, and so would shut the other processes out.
            if ranks.leads and (finished := finished_report(job, output, config)) is None:
                refuse_output(job, output, config)
            if (finished := ranks.from_first(finished)) is not None:
                return finished.model_copy(update={"warnings": (*finished.warnings, _UNCOMPARED)})
        job = self._inputs.with_store(job, progress, ranks)
        plan = job.plan(config)
        metadata = require_restorable(job, plan, config)
        output = describe_output(job, plan, expanded(output_dir), config)
        finished = finished_report(job, output, config) if ranks.leads else None
        if (finished := ranks.from_first(finished)) is not None:
            return finished
        if not ranks.leads:
            # Rank 0 has made the folder before it asks for anything.
            folder = output.folder.absolute()
            trial = own_trial(job, plan, config, folder, ranks=ranks, reserve=output.needed)
            serve(trial, ranks, plan, output)
            return ranks.from_first()
        with open_writer(job, output, config) as writer:
            writer.require_space(output.needed, what=output.what)
            trial = open_trial(job, plan, config, writer.out, ranks=ranks, reserve=output.needed)
            report = self._written(trial, output, writer, metadata, started, memory, progress or ignore)
        # Nothing more is asked.
        ranks.from_first(None)
        return ranks.from_first(report)

    def _written(
        self,
        trial: Trial,
        output: Output,
        writer: CheckpointWriter,
        metadata: Mapping[str, Any] | None,
        started: float,
        memory: int,
        progress: Progress,
    ) -> RestoreReport:
        """Find the price and write the output."""
        job, config = trial.job, trial.config
        price = _price(trial, self._resident, writer, progress)
        if config.output_format == "adapter" and config.is_priced and price.mu >= PROHIBITIVE:
            writer.discard()
            raise DeltaguardError(
                f"Within the limits nothing is left of the delta, so the adapter would be empty: serve "
                f"{job.aligned.reference} as it is, or allow more."
            )
        refined = refined_layers(trial, price, writer, self._resident, progress)
        price = refined.price
        try:
            rows = _stage(trial, refined, writer, self._ranks, progress)
        except EmptyAdapterError:
            writer.discard()
            raise
        try:
            job.check_unchanged()
            _check_result(job, rows, price)
        except DeltaguardError:
            # Of no use, so there is nothing to resume.
            writer.discard()
            raise
        report = summarise(trial, price, rows, output, started, memory)
        told = {"refinement": refined.record, "warnings": (*report.warnings, *refined.warnings)}
        report = report.model_copy(update=told)
        writer.text(CARD_NAME, model_card(report, front_matter=metadata))
        report = report.model_copy(update={"files": _files(writer)})
        writer.text(REPORT_NAME, report.model_dump_json(indent=2) + "\n")
        if config.output_format == "adapter":
            commit_adapter(writer)
        else:
            writer.commit(last=job.finetuned.index_name or job.finetuned.shards[0])
        return report


def restore(
    aligned: str | Path,
    finetuned: str | Path,
    output_dir: str | Path,
    *,
    store: CurvatureStore | str | Path | None = None,
    config: RestoreConfig | None = None,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> RestoreReport:
    """Write a checkpoint that keeps what fine-tuning taught and refuses like the aligned model.

    The output is a PEFT adapter where the options say so. Otherwise it mirrors the fine-tuned checkpoint
    (for a LoRA adapter: the aligned one): the same shard files, tensors and dtypes, with every non-weight
    file of its folder. Weights are streamed: in memory are two tensors of each model and one layer's
    workspace; with the dial, the model as well, or a block of it at a time where it does not fit. The inputs
    are not touched. Many fine-tunes of one aligned model take less time together, see `Restorer`.

    Args:
        aligned: the model before fine-tuning: a local folder, a Hub id, or `id@revision`.
        finetuned: the model after it: the same, or a PEFT LoRA adapter folder.
        output_dir: a new or empty folder, unless the configuration says otherwise. With `resume`, the
            finished output of the same job is left as it is.
        store: the aligned model's curvature; calibrated first where it is absent and the method needs it.
        config: method, strength and the other choices; the default is `RestoreConfig()`.
        progress: called after each tensor.
        ranks: the processes that share the work, all of which call this; by default this one alone.

    Returns:
        The report, which the output folder also holds as `deltaguard_report.json`.

    Raises:
        DeltaguardError: an input cannot be used, or the output cannot be written; nothing is left that
            looks like a finished checkpoint, and nothing is lost that no earlier restore wrote.

    Example:
        ```python
        report = restore("Qwen/Qwen3-0.6B", "./my-finetune", "./restored", store="./store")
        print(report.kept_energy, report.safety_cost)
        ```
    """
    with Restorer(aligned, store=store, config=config, ranks=ranks) as restorer:
        return restorer.restore(finetuned, output_dir, progress=progress)


def _stage(
    trial: Trial, refined: Refined, writer: CheckpointWriter, ranks: Ranks, progress: Progress
) -> list[LayerRow | OtherRow]:
    """Write everything but the report and the card."""
    price = refined.price
    if trial.config.output_format == "adapter":
        return _stage_adapter(trial, price, writer, progress)
    job, config = trial.job, trial.config
    rows = write_files(
        trial,
        price.mu,
        writer,
        ranks,
        progress,
        whole=price.dial is not None and price.dial.whole,
        change=refined.edited if refined.tensors else None,
    )
    files = checkpoint_files(job.aligned, job.finetuned, config_from=config.config_from)
    for name, source in files.items():
        writer.copy(source, name)
    return rows


def _stage_adapter(
    trial: Trial, price: Price, writer: CheckpointWriter, progress: Progress
) -> list[LayerRow | OtherRow]:
    """Restore layer by layer and stage the adapter; `commit_adapter` moves it into place."""
    from deltaguard.models.loading import module_names

    job = trial.job
    rows: list[LayerRow | OtherRow] = [*trial.other_rows()]

    def layers() -> Iterator[AdapterLayer]:
        for number, (step, factors, row) in enumerate(trial.factors(price.mu), start=1):
            rows.append(row)
            progress(Event("restore", number, len(trial.steps)))
            yield step.aligned_name.removesuffix(".weight"), factors

    files = adapter_files(job.aligned, job.finetuned, config_from=trial.config.config_from)
    # An adapter serves where the one did that it is made of, whatever class that was trained with.
    paths = job.finetuned.modules if isinstance(job.finetuned, AdapterCheckpoint) else None
    modules = module_names(job.aligned.folder)
    stage_adapter(writer, job.aligned, layers(), modules=modules, paths=paths, companions=files)
    return rows


def _price(trial: Trial, resident: Resident, writer: CheckpointWriter, progress: Progress) -> Price:
    """Find the price of safety, kept because all shards of a resumed run must have the same."""
    price = writer.remembered("price", _PRICE)
    if price is None:
        price = find_price(trial, resident, progress)
        if trial.config.is_priced:
            writer.remember("price", _PRICE.dump_python(price, mode="json"))
    return price


def _check_result(job: Job, rows: Sequence[LayerRow | OtherRow], price: Price) -> None:
    """Refuse an output that would be useless."""
    all_within = price.dial is not None and price.mu == 0
    if not any(row.delta_norm > 0 if isinstance(row, LayerRow) else row.differs for row in rows):
        raise DeltaguardError(
            f"{job.finetuned.reference} does not differ from {job.aligned.reference}: every delta is zero, "
            "so there is nothing to restore. Are both the same model?"
        )
    if not all_within and not any(
        row.utility_loss > 0 or row.detail.get("shift_norm", 0) > 0
        if isinstance(row, LayerRow)
        else row.differs and row.source != "finetuned"
        for row in rows
    ):
        raise UnchangedError(
            "This run changes no tensor: with these options the output is the fine-tuned model itself. "
            "Lower --strength, or take the other parameters from the aligned model."
        )


def _files(writer: CheckpointWriter) -> tuple[FileRow, ...]:
    """List every file of the output with its hash, but the report, which holds this list."""
    return tuple(
        FileRow(name=record.name, bytes=record.bytes, sha256=record.sha256)
        for name, record in sorted(writer.records.items())
        if name != REPORT_NAME
    )
