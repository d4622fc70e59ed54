"""The model card of a restored checkpoint: the README.md of its folder, with metadata for the Hub."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import yaml

from deltaguard.reports.outcome import origin, outcome_facts, public_warnings
from deltaguard.reports.page import rendered
from deltaguard.reports.records.restore import RestoreReport
from deltaguard.reports.restore import MOST_EXPERTS, experts_table, kinds_table, others_table
from deltaguard.reports.table import Column, Table, facts_table
from deltaguard.reports.text import hub_id, plain, public_option, short_reference

TAGS = ("deltaguard", "safe-delta")

_REPLACED = ("base_model", "base_model_relation", "library_name", "tags")
# Results that were measured on the fine-tuned model do not hold for the restored one.
_DROPPED = ("model-index",)


def model_card(report: RestoreReport, *, front_matter: Mapping[str, Any] | None) -> str:
    """Draw the README.md of a restored folder.

    Args:
        report: of the restore that wrote the folder.
        front_matter: metadata of the fine-tuned folder's own README.md, if it has one. License, language
            and the rest are kept, but for results that were measured on the fine-tuned model.

    Returns:
        Markdown that starts with a YAML block.

    Example:
        ```python
        (folder / "README.md").write_text(model_card(report, front_matter={"license": "mit"}))
        ```
    """
    metadata = card_metadata(report, front_matter)
    options = Table.of(
        "",
        report.options.items(),
        (
            (Column("option", "name", code=True), lambda pair: pair[0]),
            (Column("as run", "words", code=True), lambda pair: public_option(pair[1])),
        ),
    )
    return rendered(
        "card.md.jinja",
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000),
        report=report,
        name=short_reference(report.finetuned.reference),
        aligned=short_reference(report.aligned.reference),
        method=plain(report.method_title),
        adapter=is_adapter(report),
        options=options.markdown(),
        outcome=facts_table("result", outcome_facts(report)).markdown(),
        origin=origin(report),
        asked=report.dial is not None and report.dial.attack is not None,
        kinds=kinds_table(report.layers).markdown(),
        experts=experts_table(report.rare_experts).markdown() if report.rare_experts else "",
        most_experts=MOST_EXPERTS,
        others=others_table(report.others).markdown() if report.others else "",
        warnings=[plain(warning) for warning in public_warnings(report)],
    )


def card_metadata(report: RestoreReport, front_matter: Mapping[str, Any] | None) -> dict[str, Any]:
    """Find the metadata that the Hub reads.

    `base_model` is the fine-tuned model if it lies on the Hub, else what its own card names, else the aligned
    model; a folder is never named.

    Args:
        report: as in `model_card`.
        front_matter: as in `model_card`.
    """
    given = dict(front_matter or {})
    metadata = {key: value for key, value in given.items() if key not in _REPLACED + _DROPPED}
    metadata.setdefault("pipeline_tag", "text-generation")
    adapter = is_adapter(report)
    metadata["library_name"] = "peft" if adapter else "transformers"
    bases = _bases(report, _texts(given.get("base_model")))
    if bases:
        metadata["base_model"] = bases[0] if len(bases) == 1 else bases
        metadata["base_model_relation"] = "adapter" if adapter else "finetune"
    # Tags such as `base_model:adapter:...` are derived from the metadata; another model's would be wrong.
    tags = [tag for tag in _texts(given.get("tags")) if not tag.startswith("base_model:")]
    # Without curvature, what was done is not Safe Delta.
    own = TAGS if report.store_conversations else TAGS[:1]
    metadata["tags"] = list(dict.fromkeys([*tags, *own]))
    return metadata


def is_adapter(report: RestoreReport) -> bool:
    """Tell whether the restore wrote an adapter over the aligned model."""
    return report.options.get("output_format") == "adapter"


def _bases(report: RestoreReport, given: Sequence[str]) -> list[str]:
    if is_adapter(report):
        return [found] if (found := hub_id(report.aligned.reference)) else []
    for references in ([report.finetuned.reference], given, [report.aligned.reference]):
        found = [repository for reference in references if (repository := hub_id(reference))]
        if found:
            return found
    return []


def _texts(value: Any) -> list[str]:
    """Give a metadata field that may be absent, one text, or a list of them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Sequence):
        return [str(item) for item in cast("Sequence[Any]", value)]
    return []
