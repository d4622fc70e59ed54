"""A restore at the end of Axolotl's training, by two entries in its configuration.

Axolotl calls a plugin's `post_train_unload` once the model is saved and its memory is free again.

Example:
    ```yaml
    plugins:
      - deltaguard.integrations.axolotl.RestorePlugin
    deltaguard:
      store: ./store
      options:
        training_data: trusted
    ```
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]  # not of any extra
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deltaguard.integrations.trl import default_options, refuse_beforehand, refuse_zero3
from deltaguard.models.adapter import is_adapter
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.restore import restore

if TYPE_CHECKING:
    from deltaguard.reports.records.restore import RestoreReport

_LOG = logging.getLogger(__name__)


class RestoreSettings(BaseModel):
    """What stands under `deltaguard` in Axolotl's configuration, checked before the training.

    Attributes:
        aligned: the model before training, a folder, a Hub id, or `id@revision`; where absent `base_model`,
            at `revision_of_model` if that is given. To be named where `base_model` is a quantised copy.
        store: the aligned model's curvature, as in `restore`; made once and cached where absent.
        output: the folder of the restored model; where absent that of `output_dir`, with `-restored` behind
            its name.
        options: those of `RestoreConfig` by their names. By default an adapter becomes an adapter again, and
            the aligned model's configuration and tokenizer are taken, which trainers write otherwise.
    """

    model_config = ConfigDict(extra="forbid")

    aligned: str | None = None
    store: str | None = None
    output: str | None = None
    options: dict[str, Any] = Field(default_factory=dict[str, Any])


class RestoreArgs(BaseModel):
    """The field that the plugin adds to Axolotl's configuration."""

    deltaguard: RestoreSettings = Field(default_factory=RestoreSettings)

    @model_validator(mode="before")
    @classmethod
    def _are_options(cls, given: Any) -> Any:
        """Refuse options that a restore of what is trained would refuse; `adapter` is Axolotl's own field."""
        if isinstance(given, Mapping):
            config = cast("Mapping[str, Any]", given)
            settings = RestoreSettings.model_validate(config.get("deltaguard") or {})
            _options(settings, adapter=bool(config.get("adapter")))
        return given


class RestorePlugin(BasePlugin):  # pyright: ignore[reportUntypedBaseClass]
    """Restores what Axolotl trained, in full or as a LoRA adapter, into a folder beside it.

    Attributes:
        report: of the restore, once training has ended; None on all processes but the first.
    """

    def __init__(self) -> None:
        """Prepare; the configuration comes later."""
        super().__init__()
        self.report: RestoreReport | None = None

    def get_input_args(self) -> str:
        """Name the class of the configuration's further field."""
        return f"{__name__}.{RestoreArgs.__name__}"

    def post_trainer_create(self, cfg: Mapping[str, Any], trainer: Any) -> None:  # noqa: ARG002
        """Refuse what could not be restored, before there is a training to lose.

        Models are loaded for other commands of Axolotl, too; a trainer is made for a training alone.

        Args:
            cfg: Axolotl's configuration.
            trainer: which is about to train.

        Raises:
            DeltaguardError: as `deltaguard.integrations.trl.refuse_beforehand`.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        settings, aligned, output = _asked(cfg)
        config = _options(settings, adapter=bool(cfg.get("adapter")))
        refuse_beforehand(aligned, output, store=settings.store, config=config)

    def post_train_unload(self, cfg: Mapping[str, Any]) -> None:
        """Restore what lies in `output_dir`.

        Args:
            cfg: Axolotl's configuration.

        Raises:
            DeltaguardError: as `restore`, or this is DeepSpeed's ZeRO-3; what was trained is left as it is.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        settings, aligned, output = _asked(cfg)
        finetuned = Path(cfg["output_dir"])
        config = _options(settings, adapter=is_adapter(str(finetuned)))
        refuse_zero3(aligned, finetuned, output, store=settings.store, config=config)
        self.report = restore(aligned, finetuned, output, store=settings.store, config=config)
        for warning in self.report.warnings:
            _LOG.warning("%s", warning)
        _LOG.info("Restored: %s, %.0f %% of the delta's energy kept", output, 100 * self.report.kept_energy)


def _options(settings: RestoreSettings, *, adapter: bool) -> RestoreConfig:
    return RestoreConfig.model_validate(default_options(adapter=adapter) | settings.options)


def _asked(cfg: Mapping[str, Any]) -> tuple[RestoreSettings, str, Path]:
    """Find the settings in Axolotl's configuration, the aligned model, and the folder of the output."""
    settings = RestoreSettings.model_validate(cfg.get("deltaguard") or {})
    output = Path(settings.output or f"{Path(cfg['output_dir'])}-restored")
    return settings, settings.aligned or _base_model(cfg), output


def _base_model(cfg: Mapping[str, Any]) -> str:
    revision = cfg.get("revision_of_model")
    return f"{cfg['base_model']}@{revision}" if revision else str(cfg["base_model"])
