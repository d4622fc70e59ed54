"""What of a model's configuration, tokenizer and chat template counts: everything but what is listed here."""

import json
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, Literal, cast

from deltaguard.models.families import text_parts

Part = Literal["config", "tokenizer", "template"]
"""A part of a model beside its weights that decides what it predicts for a text."""

ConfigFrom = Literal["aligned", "finetuned"]
"""The model that an output's configuration, tokenizer and chat template come from."""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"

# Fields of a configuration that cannot change predictions, at any depth. One that is not here counts.
_WITHOUT_EFFECT = frozenset(
    {
        # Names, paths and versions; transformers goes by `model_type`, not by the name of a class.
        *("_name_or_path", "name_or_path", "_commit_hash", "architectures"),
        *("transformers_version", "unsloth_version", "unsloth_fixed"),
        # How numbers are stored and computed, which is chosen anew wherever a model is loaded.
        *("dtype", "torch_dtype", "use_cache", "gradient_checkpointing", "pretraining_tp"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"),
        # What a call returns besides logits.
        *("output_attentions", "output_hidden_states", "return_dict", "_output_attentions"),
        # Training alone: dropout is off and nothing is initialised when a model answers.
        *("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
        *("dropout", "hidden_dropout", "hidden_dropout_prob", "activation_dropout", "layerdrop"),
        *("initializer_range", "initializer_factor", "init_std"),
        *("output_router_logits", "router_aux_loss_coef"),
        # Heads of classifiers, which a language model does not have.
        *("classifier_dropout", "id2label", "label2id", "num_labels", "problem_type"),
        # Padding is masked. What begins a text is put there by tokenizer and template, which are compared.
        *("pad_token_id", "bos_token_id"),
        # Taken together from two files; see `end_tokens`.
        "eos_token_id",
    }
)
_GENERATED_TOKENS = (
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
    *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
)
# Likewise of tokenizer_config.json and special_tokens_map.json: names, padding and cutting off.
_WITHOUT_EFFECT_ON_TOKENS = frozenset(
    {
        *("name_or_path", "processor_class", "chat_template"),
        *("pad_token", "pad_token_type_id", "pad_to_multiple_of", "padding_side"),
        *("model_max_length", "max_length", "stride", "truncation_side", "truncation_strategy"),
    }
)
_TOKENIZER_NAMES = (
    *("tokenizer", "special_tokens_map.json", "added_tokens.json"),
    *("vocab", "merges.txt", "sentencepiece", "spiece", "spm", "tekken", "tiktoken"),
)
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".bpe", ".spm")


def part_of(path: str) -> Part | None:
    """Tell which part of a model a file decides about.

    Args:
        path: of the file, relative to the model's folder.

    Returns:
        The part; `tokenizer` for `tokenizer_config.json`, which can hold a template as well; None for a file
        that decides about none, such as a licence.

    Example:
        >>> part_of("generation_config.json"), part_of("merges.txt"), part_of("LICENSE")
        ('config', 'tokenizer', None)
    """
    folders, name = PurePath(path).parent.as_posix(), PurePath(path).name
    if folders == TEMPLATE_FOLDER and name.endswith(".jinja"):
        return "template"
    if folders != ".":
        return None
    if name in (CONFIG, GENERATION_CONFIG):
        return "config"
    if name in (TEMPLATE, "chat_template.json"):
        return "template"
    is_tokenizer = name.startswith(_TOKENIZER_NAMES) or name.endswith(_TOKENIZER_SUFFIXES)
    return "tokenizer" if is_tokenizer else None


def counting_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration what cannot change predictions, at any depth.

    Tokens that end an answer are left out too: `end_tokens` takes them from both of a model's files.
    """
    return _without(config, _WITHOUT_EFFECT)


def counting_generation(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Leave of a generation configuration the tokens that are forced or never given.

    How tokens are drawn (temperature and its kind) changes no prediction and is chosen by whoever asks.
    """
    return {name: generation[name] for name in _GENERATED_TOKENS if generation.get(name) is not None}


def end_tokens(*configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Collect the ids that end an answer, named by any of a model's configurations.

    They are taken together because trainers move them from one file to the other.

    Args:
        configs: the content of `config.json` and `generation_config.json`; a `text_config` is looked into.

    Example:
        >>> end_tokens({"eos_token_id": 2}, {"eos_token_id": [5, 2]})
        (2, 5)
    """
    found: set[int] = set()
    for config in configs:
        for part in text_parts(config):
            named: Any = part.get("eos_token_id")
            tokens = cast("list[Any]", named) if isinstance(named, list) else [named]
            # A bool is an int too.
            found |= {token for token in tokens if type(token) is int}
    return tuple(sorted(found))


def counting_tokenizer_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of `tokenizer_config.json`, or `special_tokens_map.json`, what cannot change tokens."""
    return _without(content, _WITHOUT_EFFECT_ON_TOKENS)


def counting_tokenizer(content: Mapping[str, Any]) -> dict[str, Any]:
    """Leave padding and truncation out of the content of `tokenizer.json`; callers set them."""
    return {name: value for name, value in content.items() if name not in ("padding", "truncation")}


def counting_template(text: str) -> str:
    """Bring a chat template into the form that Jinja reads: one kind of line end, and none at the end."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


def plain_json(content: Any) -> str:
    """Write JSON in one way whatever the order of fields and the spelling of whole numbers.

    Example:
        >>> plain_json({"b": 1e4, "a": None})
        '{"a":null,"b":10000}'
    """
    return json.dumps(_plain(content), sort_keys=True, separators=(",", ":"))


def differing_fields(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Find the fields, written with dots, in which two documents differ.

    A field that is absent and one that is null are the same.

    Args:
        one: a JSON object.
        other: another.

    Yields:
        The field and its two values, None where it is absent.

    Example:
        >>> list(differing_fields({"rope": {"theta": 1.0, "type": "a"}}, {"rope": {"theta": 2}, "x": None}))
        [('rope.theta', 1.0, 2), ('rope.type', 'a', None)]
    """
    for name in sorted({*one, *other}):
        mine, theirs = one.get(name), other.get(name)
        inner = [each for each in (mine, theirs) if each is not None]
        if inner and all(isinstance(each, Mapping) for each in inner):
            yield from ((f"{name}.{rest}", a, b) for rest, a, b in differing_fields(mine or {}, theirs or {}))
        elif plain_json(mine) != plain_json(theirs):
            yield name, mine, theirs


def of_one_kind(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Take the language model's configuration out of one that holds others, where the second does not.

    A fine-tune of a model for text and images can be saved as a model for text alone.

    Args:
        one: a resolved configuration.
        other: another.
    """
    if one.get("model_type") == other.get("model_type"):
        return one, other
    return one.get("text_config") or one, other.get("text_config") or other


def _without(content: Mapping[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    return {
        name: _without(value, fields) if isinstance(value, Mapping) else value
        for name, value in content.items()
        if name not in fields
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
