"""A restore at the end of training with trl, or with any other trainer of transformers.

A callback's `on_train_end` comes before `save_model`: the output folder then holds no model, or that of an
earlier run. What is here saves the model itself, into a folder of its own, before it restores.
"""

import json
import shlex
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from deltaguard.curvature.store import CurvatureStore
from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import problems
from deltaguard.models.layout import ADAPTER_CONFIG
from deltaguard.models.lora_config import refuse_more_than_plain
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.restoration.aligned import AlignedInputs
from deltaguard.restoration.looks import make_judge
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore

FINETUNED, RESTORED = "finetuned", "restored"
"""Folders in the trainer's output folder: what was trained, and what deltaguard makes of it."""

_DEFAULT = "default"
"""PEFT's name of an adapter that nobody names; trl adds another, `ref`, where preferences are learned."""


def restore_after(
    trainer: Any,
    *,
    aligned: str | Path,
    store: CurvatureStore | str | Path | None = None,
    config: RestoreConfig | None = None,
) -> RestoreReport | None:
    """Save what a trainer trained, in full or as a LoRA adapter, and restore it.

    The trainer's model and optimizer keep their memory meanwhile: where that leaves too little, save, and run
    `deltaguard restore` in a process of its own. Nothing is pushed to the Hub; a trainer's own `push_to_hub`
    uploads what was trained, not what was restored.

    Args:
        trainer: a transformers or trl trainer, after `train()`. Its folder `finetuned` receives the model as
            it was trained, and `restored` the restored one.
        aligned: the model before training: a folder, a Hub id, or `id@revision`.
        store: as in `restore`.
        config: as in `restore`; where it does not say otherwise, an adapter becomes an adapter again, and the
            aligned model's configuration and tokenizer are taken, which trainers write otherwise.

    Returns:
        The report; None on all processes of a distributed training but the first, which restores.

    Raises:
        DeltaguardError: as `restore`; or no other model can be loaded beside the training (DeepSpeed ZeRO-3).

    Example:
        ```python
        trainer = SFTTrainer(model="models/aligned", args=args, train_dataset=rows)
        trainer.train()
        report = restore_after(trainer, aligned="models/aligned")
        ```
    """
    folder = Path(trainer.args.output_dir)
    with _saved_whole(trainer):
        # All processes take part in saving where each holds a part of the model. A trainer whose model is to
        # be pushed to the Hub would push this one.
        trainer.save_model(str(folder / FINETUNED), _internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    merged = _merged(config, adapter=(folder / FINETUNED / ADAPTER_CONFIG).exists())
    refuse_zero3(aligned, folder / FINETUNED, folder / RESTORED, store=store, config=merged)
    return restore(aligned, folder / FINETUNED, folder / RESTORED, store=store, config=merged)


@contextmanager
def _saved_whole(trainer: Any) -> Generator[None]:
    """Have a trainer under FSDP, which may save each process's part, save the whole model meanwhile."""
    if not trainer.is_fsdp_enabled:
        yield
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    before = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(before)


def refuse_zero3(
    aligned: str | Path,
    finetuned: Path,
    output: Path,
    *,
    store: CurvatureStore | str | Path | None,
    config: RestoreConfig,
) -> None:
    """Refuse a restore in a process of DeepSpeed's ZeRO-3, which would load parts of models alone.

    Args:
        aligned: as in `restore_after`.
        finetuned: the folder of what was trained.
        output: the folder of what was to be restored.
        store: as in `restore_after`.
        config: the options, none of them left out.

    Raises:
        DeltaguardError: it is one; with the command that restores afterwards.
    """
    if not is_deepspeed_zero3_enabled():
        return
    command = ["deltaguard", "restore", str(aligned), str(finetuned), "-o", str(output)]
    if store is not None:
        command += ["--store", str(store.folder if isinstance(store, CurvatureStore) else store)]
    command += _as_options(config)
    judge = ", with the judge's options in that file" if "--judge" in command else ""
    gathered = ""
    if not any(finetuned.glob("*.safetensors")):
        gathered = (
            " It holds parts of the weights: put them together first with DeepSpeed's `zero_to_fp32.py`, or "
            "train with `stage3_gather_16bit_weights_on_model_save`."
        )
    raise DeltaguardError(
        "Under DeepSpeed's ZeRO-3 no other model can be loaded in this process. What was trained is in "
        f"{finetuned}.{gathered} Run `{shlex.join(command)}`{judge}."
    )


def _as_options(config: RestoreConfig) -> list[str]:
    """Write options as a command line has them; a judge stands in a file of its own there."""
    # In their order, which a set has not.
    given = {n: getattr(config, n) for n in RestoreConfig.model_fields if n in config.model_fields_set}
    own = {
        name: value for part in ("method_options", "models") for name, value in given.pop(part, {}).items()
    }
    if "judge" in given:
        given["judge"] = "JUDGE.yaml"
    command: list[str] = []
    for name, value in (given | own).items():
        option = f"--{name.replace('_', '-')}"
        if name in ("overwrite", "resume"):
            command += [option] if value else []
        elif value is not None:
            command += [option, str(value).lower() if isinstance(value, bool) else str(value)]
    return command


def refuse_beforehand(
    aligned: str | Path,
    output: Path,
    *,
    store: CurvatureStore | str | Path | None,
    config: RestoreConfig,
) -> None:
    """Refuse what could not be restored, before there is a training to lose.

    Args:
        aligned: as in `restore_after`.
        output: the folder of what will be restored.
        store: as in `restore_after`.
        config: the options.

    Raises:
        DeltaguardError: the aligned model, the store or the judge cannot be used, or the output folder holds
            something that may not be replaced.
    """
    AlignedInputs.open(aligned, store=store, config=config).look(aligned)
    if config.added_attack_success is not None:
        make_judge(config)
    if not (config.overwrite or config.resume) and output.exists() and any(output.iterdir()):
        raise DeltaguardError(
            f"{output} is not empty, and receives the restored model: remove it, name another output folder, "
            "or allow it with the option `overwrite`."
        )


class RestoreCallback(TrainerCallback):
    """Restores at the end of training; for trainers that somebody else makes, such as LLaMA-Factory's.

    Attributes:
        report: of the restore, once training has ended.

    Example:
        ```python
        callback = RestoreCallback(aligned="models/aligned")
        SFTTrainer(model="models/aligned", args=args, train_dataset=rows, callbacks=[callback]).train()
        callback.report.kept_energy
        ```
    """

    def __init__(
        self,
        *,
        aligned: str | Path,
        store: CurvatureStore | str | Path | None = None,
        config: RestoreConfig | None = None,
    ) -> None:
        """Prepare; the arguments are those of `restore_after`."""
        self.report: RestoreReport | None = None
        self._aligned, self._store, self._config = aligned, store, config

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Refuse what could not be restored, before there is a training to lose.

        Raises:
            DeltaguardError: training is distributed, the adapter is more than a plain one, or as
                `refuse_beforehand`.
        """
        if args.world_size > 1 or is_deepspeed_zero3_enabled():
            raise DeltaguardError(
                f"Training runs in {args.world_size} processes or under DeepSpeed's ZeRO-3, and a callback "
                "sees a part of the model: leave it out, and call `restore_after(trainer, ...)` after "
                "`trainer.train()`."
            )
        adapters: dict[str, Any] | None = getattr(given.get("model"), "peft_config", None)
        is_adapter = adapters is not None
        if adapters is not None:
            _refuse_odd(adapters)
        config = _merged(self._config, adapter=is_adapter)
        refuse_beforehand(self._aligned, Path(args.output_dir) / RESTORED, store=self._store, config=config)
        finetuned = Path(args.output_dir) / FINETUNED
        if (finetuned / ADAPTER_CONFIG).exists() != is_adapter and finetuned.exists():
            kinds = ("an adapter", "a model") if is_adapter else ("a model", "an adapter")
            raise DeltaguardError(
                f"{finetuned} receives {kinds[0]}, and holds {kinds[1]} of an earlier training: remove it, "
                "or name another output_dir."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
        """Save the model and restore it.

        Raises:
            DeltaguardError: as `restore`.
        """
        folder = Path(args.output_dir)
        given["model"].save_pretrained(folder / FINETUNED)
        # None where the data were tokenised before.
        if (processing := given.get("processing_class")) is not None:
            processing.save_pretrained(folder / FINETUNED)
        merged = _merged(self._config, adapter=(folder / FINETUNED / ADAPTER_CONFIG).exists())
        self.report = restore(
            self._aligned, folder / FINETUNED, folder / RESTORED, store=self._store, config=merged
        )


def _refuse_odd(adapters: Mapping[str, Any]) -> None:
    """Refuse adapters that PEFT would save elsewhere, or that are more than plain LoRA."""
    if _DEFAULT not in adapters:
        raise DeltaguardError(
            f"The adapter in training is called {', '.join(adapters)}, and PEFT saves one of another name "
            f"than {_DEFAULT!r} in a folder of its own: give it that name."
        )
    # As PEFT writes it: sets as lists, and enumerations as what they stand for.
    written = json.dumps(adapters[_DEFAULT].to_dict(), default=list)
    refuse_more_than_plain(written.encode(), "in training")


def default_options(*, adapter: bool) -> dict[str, str]:
    """Choose what a restore at the end of a training does where nobody says.

    Args:
        adapter: whether an adapter was trained.

    Returns:
        Options of `RestoreConfig`: an adapter becomes an adapter again, and the output is run as the aligned
        model is.
    """
    return {"output_format": "adapter" if adapter else "checkpoint", "config_from": "aligned"}


def _merged(config: RestoreConfig | None, *, adapter: bool) -> RestoreConfig:
    """Put what a user says over `default_options`.

    Raises:
        DeltaguardError: they do not go together.
    """
    given = {} if config is None else {name: getattr(config, name) for name in config.model_fields_set}
    try:
        return RestoreConfig.model_validate(default_options(adapter=adapter) | given)
    except ValidationError as error:
        title = "An adapter becomes an adapter here, and a checkpoint with RestoreConfig(output_format=...)"
        raise DeltaguardError(listed(title, problems(error))) from error
