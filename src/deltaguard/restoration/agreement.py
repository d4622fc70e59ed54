"""Whether an aligned and a fine-tuned model are run and asked alike, so that only weights differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError, listed
from deltaguard.models.canonical import (
    CONFIG,
    counting_config,
    counting_generation,
    differing_fields,
    end_tokens,
    of_one_kind,
    part_of,
)
from deltaguard.models.checkpoint import WeightSource
from deltaguard.models.families import is_output_head, is_unread
from deltaguard.models.identity import ModelIdentity, configs_of, identify, templates_of
from deltaguard.models.loading import load_config, load_tokenizer
from deltaguard.models.mirror import loadable, output_files
from deltaguard.restoration.options import RestoreConfig
from deltaguard.restoration.plan import Plan
from deltaguard.restoration.tokens import Difference, LoadedTokenizer, shortened, tokenizer_differences

_ALIGNED = "`--config-from aligned` gives the output what the aligned model has, and measures it so."
_FINETUNED = "`--config-from finetuned` gives it what the fine-tuned model has, and measures it so."
_OTHER_IDS = (
    "the tokenizers give the same text other ids, so that safety KL would compare predictions of different "
    "tokens"
)
_OVER_ALIGNED = "an adapter is loaded over the aligned model, whose configuration it cannot change"


@dataclass(frozen=True)
class Identified:
    """A model and what identifies it, found once.

    Attributes:
        source: the model.
        identity: what identifies it.
    """

    source: WeightSource
    identity: ModelIdentity

    @classmethod
    def of(cls, source: WeightSource) -> "Identified":
        """Identify a model.

        Raises:
            DeltaguardError: a file of it cannot be read.
        """
        return cls(source, identify(source))


def differences(aligned: Identified, finetuned: Identified) -> tuple[Difference, ...]:
    """Find what two models do not have in common besides weights and what changes what they predict.

    Files that say the same are looked at no further. What others say is resolved by transformers, so that a
    default that one version writes down and another leaves out is no difference. The fine-tuned model may
    know further tokens.

    Args:
        aligned: the aligned model.
        finetuned: the fine-tuned model.

    Raises:
        DeltaguardError: a file cannot be read, or transformers cannot load what it describes.
    """
    weights = {"fingerprint": aligned.identity.fingerprint}
    if finetuned.identity.model_copy(update=weights) == aligned.identity:
        return ()
    one, other = _Resolved.of(aligned.source), _Resolved.of(finetuned.source)
    return (
        *_config_differences(one, other),
        *tokenizer_differences(one.tokenizer, other.tokenizer),
        *_template_differences(templates_of(one.files), templates_of(other.files)),
    )


def require_agreement(aligned: Identified, finetuned: Identified, plan: Plan, config: RestoreConfig) -> None:
    """Refuse a restore of which it is open how its output is to be run and asked.

    Args:
        aligned: the aligned model.
        finetuned: the fine-tuned model.
        plan: of the restore.
        config: its options.

    Raises:
        DeltaguardError: the models differ in more than weights and the options do not choose between them,
            or choose what cannot serve. All differences are listed.
    """
    _require_head(aligned.source, finetuned.source, config)
    unfit = _further_rows(aligned.source, plan) or _absent_parts(aligned.source, finetuned.source, plan)
    if config.config_from == "aligned":
        if unfit:
            raise DeltaguardError(
                f"`--config-from aligned` cannot serve: {unfit}. Take `--config-from finetuned`."
            )
        return
    found = differences(aligned, finetuned)
    against = {
        "ids": _OTHER_IDS,
        **({"config": _OVER_ALIGNED} if config.output_format == "adapter" else {}),
    }
    blocked = [against[each.kind] for each in found if each.kind in against]
    if not found or (config.config_from == "finetuned" and not blocked):
        return
    one, other = aligned.source.reference, finetuned.source.reference
    title = f"{one} and {other} differ in more than weights and predict otherwise with the same ones"
    remedies = [
        f"`--config-from aligned` cannot serve: {unfit}." if unfit else _ALIGNED,
        *(f"`--config-from finetuned` cannot serve: {reason}." for reason in dict.fromkeys(blocked)),
        *([] if blocked else [_FINETUNED]),
    ]
    raise DeltaguardError("\n".join([listed(title, [each.text for each in found]), *remedies]))


@dataclass(frozen=True)
class _Resolved:
    """What transformers makes of a model's files besides weights."""

    files: Mapping[str, Path]
    config: Mapping[str, Any]
    tokenizer: LoadedTokenizer

    @classmethod
    def of(cls, source: WeightSource) -> "_Resolved":
        files = source.files()
        with loadable(files) as folder:
            config = load_config(folder, source.reference).to_dict() if CONFIG in files else {}
            is_there = any(part_of(path) == "tokenizer" for path in files)
            tokenizer = load_tokenizer(folder, source.reference) if is_there else None
        return cls(files, config, LoadedTokenizer(tokenizer, files))


def _config_differences(one: _Resolved, other: _Resolved) -> Iterator[Difference]:
    configs = (counting_config(each) for each in of_one_kind(one.config, other.config))
    for name, mine, theirs in differing_fields(*configs):
        is_size = name.rpartition(".")[2] == "vocab_size"
        if not (is_size and isinstance(mine, int) and isinstance(theirs, int) and theirs > mine):
            yield Difference.between("config", f"`{name}`", mine, theirs)
    generations = [configs_of(each.files)[1] for each in (one, other)]
    for name, mine, theirs in differing_fields(*map(counting_generation, generations)):
        yield Difference.between("config", f"`{name}`", mine, theirs)
    pairs = zip((one.config, other.config), generations, strict=True)
    ends = [list(end_tokens(*pair)) for pair in pairs]
    if ends[0] != ends[1]:
        yield Difference.between("config", "`eos_token_id`", *ends)


def _template_differences(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[Difference]:
    for name in sorted({*one, *other}):
        what = "chat template" if name == "default" else f"chat template {shortened(name)}"
        mine, theirs = one.get(name), other.get(name)
        if mine == theirs or (name == "processor" and None in (mine, theirs)):
            continue
        if mine is None or theirs is None:
            yield Difference.between("template", what, mine, theirs)
            continue
        same = zip(mine, theirs, strict=False)
        start = next((i for i, (a, b) in enumerate(same) if a != b), min(len(mine), len(theirs)))
        excerpts = " / ".join(shortened(text[start:]) for text in (mine, theirs))
        yield Difference("template", f"{what} differs from character {start}: {excerpts}")


def _require_head(aligned: WeightSource, finetuned: WeightSource, config: RestoreConfig) -> None:
    """Refuse an output that would be loaded with a head of random numbers."""
    if any(map(is_output_head, finetuned.tensors)):
        return
    with loadable(output_files(aligned, finetuned, config_from=config.config_from)) as folder:
        found = load_config(folder, finetuned.reference)
    if not (found.tie_word_embeddings or found.get_text_config().tie_word_embeddings):
        owner = aligned if config.config_from == "aligned" else finetuned
        raise DeltaguardError(
            f"{finetuned.reference} stores no output head, and with the configuration of {owner.reference} "
            "(`tie_word_embeddings` is false) its input embedding would not serve as one. Take a "
            "configuration that ties the two, or store the head."
        )


def _absent_parts(aligned: WeightSource, finetuned: WeightSource, plan: Plan) -> str:
    """Say what the aligned configuration describes and the output would lack; nothing where that is all."""
    types = [source.config.get("model_type") for source in (aligned, finetuned)]
    read = [name for name in plan.absent if not is_unread(aligned.config, name)]
    if not read or types[0] == types[1]:
        return ""
    return f"it describes `{read[0]}`, which {finetuned.reference} does not have"


def _further_rows(aligned: WeightSource, plan: Plan) -> str:
    """Say which embeddings have more rows than the aligned configuration can hold; nothing where none has."""
    for step in plan.steps:
        own = aligned.tensors.get(step.aligned or "")
        if own is not None and step.info.shape[:1] > own.shape[:1]:
            return (
                f"`{step.info.name}` has {step.info.shape[0]} rows, and the aligned model's configuration "
                f"holds {own.shape[0]}"
            )
    return ""
