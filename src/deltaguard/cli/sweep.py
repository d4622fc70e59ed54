"""`deltaguard sweep`."""

from typing import Annotated

from cyclopts import Parameter

from deltaguard.cli.sink import (
    Json,
    OptionalPath,
    Output,
    Reference,
    UsageError,
    checked,
    emit,
    hide_bars_of_transformers,
    progress_bar,
    warn,
)
from deltaguard.methods import METHODS
from deltaguard.methods.method import PricedMethod
from deltaguard.restoration.options import ConfigFrom, OtherParams, RestoreConfig


def sweep(
    aligned: Reference,
    finetuned: Reference,
    /,
    *,
    output: Output,
    store: Reference | None = None,
    max_safety_kl: Annotated[tuple[float, ...], Parameter(negative="", show_default=False)] = (),
    utility: OptionalPath = None,
    method: str = RestoreConfig().method,
    confidence: float | None = None,
    other_params: OtherParams = "aligned",
    config_from: ConfigFrom | None = None,
    device: str = "auto",
    memory: str | None = None,
    json: Json = False,
) -> None:
    """Measure what a restore would keep at several limits of safety KL; no checkpoint is written.

    Args:
        aligned: The model before fine-tuning: a folder, a Hub id, or `id@revision`.
        finetuned: The model after it: the same, or a PEFT LoRA adapter folder.
        output: The folder for `sweep.json` and `report.html`.
        store: The aligned model's curvature, from `deltaguard calibrate`; if not given, made once and cached.
        max_safety_kl: A safety KL to stay under, nats per response token; may be repeated. If not given,
            1e-4, 3e-4, 6e-4, 1e-3 and 3e-3.
        utility: JSONL with `prompt` and `response`: conversations whose likelihood says what the task keeps.
        method: A method with a price: `kfac`, `ridge` or your own.
        confidence: The safety KL must be within a limit with this confidence, not on the mean alone.
        other_params: Where norms, biases and embeddings come from: `aligned` or `finetuned`.
        config_from: Whose configuration, tokenizer and chat template candidates have: `aligned` or
            `finetuned`; if not given, the two models must agree on them.
        device: Where the model runs: `auto`, `cpu`, `cuda` or `cuda:N`.
        memory: What the model that is measured may take of the device's memory, such as `8GB`, before it is
            measured block by block; and projected layers between two prices. Half of it by default, and a
            quarter.
        json: Print one JSON document and nothing else on stdout.
    """
    options = {"method": method, "confidence": confidence, "memory": memory, "device": device}
    options |= {"other_params": other_params, "config_from": config_from}
    if method in METHODS and not isinstance(METHODS[method], PricedMethod):
        raise UsageError(f"A sweep needs a method with a price to vary; {method} has none.")
    from deltaguard.cli.report import page_line
    from deltaguard.reports.sweep import sweep_table
    from deltaguard.restoration.sweep import LIMITS
    from deltaguard.restoration.sweep import sweep as run

    limits = max_safety_kl or LIMITS
    configs = [checked(RestoreConfig, options | {"max_safety_kl": limit}) for limit in limits]

    hide_bars_of_transformers()
    with progress_bar() as progress:
        report = run(
            aligned,
            finetuned,
            output,
            store=store,
            limits=limits,
            utility=utility,
            config=configs[0],
            progress=progress,
        )
    warn(report.warnings)
    emit(report, sweep_table(report), as_json=json, last=page_line(output))
