"""What differs between two checkpoints."""

from deltaguard.reports.records.base import Record

NOT_COMPARED = "not compared"
"""How a setting is told that could not be read."""


class TensorDiff(Record):
    """One tensor that differs, or of which only one model knows.

    Attributes:
        name: its name, in the fine-tuned checkpoint where it is there.
        difference: what headers tell ("shape", "dtype", "only aligned", "only finetuned") or, with the
            weights read, "values".
        aligned: shape and dtype there, None where absent.
        finetuned: shape and dtype there, None where absent.
        relative_norm: ‖Δ‖ / ‖aligned‖ where the weights were read.
        not_finite: entries of the delta that are NaN or infinite, where the weights were read.
    """

    name: str
    difference: str
    aligned: str | None
    finetuned: str | None
    relative_norm: float | None = None
    not_finite: int = 0


class KindRow(Record):
    """Tensors of one kind, such as `model.layers.*.mlp.up_proj.weight`, over all blocks.

    Attributes:
        kind: their name, with a star for the number of the block.
        tensors: how many there are.
        differing: how many of them differ; null where headers do not say and no weight was read.
        relative_norm: mean of ‖Δ‖ / ‖aligned‖, where the weights were read.
    """

    kind: str
    tensors: int
    differing: int | None
    relative_norm: float | None


class DiffReport(Record):
    """The outcome of `diff`.

    Attributes:
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        deep: whether weights were read.
        settings: what differs in configuration, tokenizer and chat template and changes predictions, with
            both values; a restore then needs `--config-from`.
        tensors: every tensor that differs.
        kinds: a summary by kind.
        compatible: whether the pair could be restored.
        obstacle: why it could not.
    """

    aligned: str
    finetuned: str
    deep: bool
    settings: tuple[str, ...]
    tensors: tuple[TensorDiff, ...]
    kinds: tuple[KindRow, ...]
    compatible: bool
    obstacle: str | None = None
