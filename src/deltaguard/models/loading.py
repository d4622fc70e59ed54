"""Models and tokenizers through transformers: no code from a model's folder runs, and nothing is asked.

A model that brings code of its own, or asks for more than any machine can build, is refused before
transformers sees it. In what follows, `folder` is the model's, and `reference` what the user called it, for
messages.
"""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor, nn

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import ANY_OBJECT, read_json
from deltaguard.text import shortened

_SHOWN_CHARACTERS = 2000
_ASKING = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
# Fields that send transformers to other files than those that are looked at here.
_REDIRECTING = ("configuration_files", "fast_tokenizer_files", "transformers_weights")
# What transformers runs without being asked by a configuration.
_RUN_BY_NAME = ("custom_generate/generate.py",)

MOST_PARTS = 1000
"""Layers, or experts of a layer; the largest models have half of it."""

_SHOWN_DIGITS = 40
# What configurations call the number of parts that are built one by one.
_COUNTED = ("layers", "n_layer", "blocks", "experts", "depth", "labels")

MOST_TOKENS = 1 << 24
"""The largest vocabularies have a tenth of it; tokenizers go through all ids up to the last, used or not."""

_Id = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]
_IDS = TypeAdapter(dict[str, _Id])


class _Token(BaseModel):
    id: _Id


class _Vocabulary(BaseModel):
    # Unigram lists pairs of token and score; the others map tokens to ids.
    vocab: dict[str, _Id] | list[Any] | None = None


class _Tokenizer(BaseModel):
    model: _Vocabulary = _Vocabulary()
    added_tokens: list[_Token] = []


@contextmanager
def foreign(what: str, kind: type[DeltaguardError] = DeltaguardError) -> Generator[None]:
    """Turn whatever another library raises in a block into one message.

    transformers, tokenizers and peft raise nearly every kind of exception where a file is not as they expect;
    so a block holds calls of theirs and nothing else.

    Args:
        what: the beginning of the message, such as "transformers cannot load my-model".
        kind: of the error that is raised.

    Raises:
        DeltaguardError: in the place of any exception but a lack of memory.

    Example:
        >>> with foreign("The number cannot be read"):
        ...     int("many")
        Traceback (most recent call last):
        deltaguard.errors.DeltaguardError: The number cannot be read: invalid literal for int() ...
    """
    try:
        yield
    except (DeltaguardError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # A panic of code in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error) or type(error).__name__
        raise kind(f"{what}: {shortened(reason, _SHOWN_CHARACTERS)}") from error


def load_config(folder: Path, reference: str) -> Any:
    """Load a model's configuration.

    Raises:
        DeltaguardError: the folder asks for code of its own, or transformers cannot load the configuration.
    """
    from transformers import AutoConfig

    refuse_code(folder, reference)
    _refuse_giants(folder, reference)
    with foreign(f"transformers cannot read the configuration of {reference}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path, reference: str) -> Any:
    """Load a model's tokenizer.

    Raises:
        DeltaguardError: the folder asks for code of its own, or transformers cannot load the tokenizer.
    """
    from transformers import AutoTokenizer

    refuse_code(folder, reference)
    _refuse_giants(folder, reference)
    with foreign(f"transformers cannot load the tokenizer of {reference}"):
        # Mistral's own tokenizer, which is taken where it is installed, knows no chat template of the folder.
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)
        last: int = max(tokenizer.get_vocab().values(), default=0)
    if last >= MOST_TOKENS:
        raise DeltaguardError(
            f"The tokenizer of {reference} has a token with the id {last:,}; {MOST_TOKENS:,} tokens are more "
            "than any vocabulary has. Copy the tokenizer again from where the model comes from."
        )
    return tokenizer


def load_model(
    folder: Path,
    reference: str,
    *,
    dtype: torch.dtype | None = None,
    config: Any = None,
    classifier: bool = False,
) -> Any:
    """Load a causal language model, in evaluation mode on the CPU, from safetensors alone.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.
        dtype: of the weights; the checkpoint's own where absent.
        config: a transformers configuration in the place of the folder's own.
        classifier: load a sequence classifier instead.

    Raises:
        DeltaguardError: the folder asks for code of its own, weights are absent for which its configuration
            asks, or transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    refuse_code(folder, reference)
    _refuse_giants(folder, reference)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    given = {} if config is None else {"config": config}
    with foreign(f"transformers cannot load {reference}"):
        loaded: Any = kind.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **given,
        )
    model, found = loaded
    # Under another configuration than their own, weights are put in their places by whoever gave it.
    if config is None and (missing := sorted(found["missing_keys"])):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DeltaguardError(
            f"{reference} lacks {', '.join(missing[:3])}{more}, for which its configuration asks: "
            "transformers would make random numbers of it. Copy the model again, or correct its config.json."
        )
    return _with_copied_views(model.eval())


def _with_copied_views(model: Any) -> Any:
    """Have what goes into a model's output head copied where it is a view, such as of the last tokens.

    Of bfloat16 and a view of three dimensions, torch on a CPU copies the head's weights for each row of the
    batch: that is gigabytes, and takes seconds.
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_copied)
    return model


def _copied(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(each.contiguous() for each in given)


def empty_model(folder: Path, reference: str) -> Any:
    """Build the causal language model that a configuration describes, without weights.

    Raises:
        DeltaguardError: as `load_config`, or transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder, reference)
    with foreign(f"transformers cannot build the model of {reference}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def skeleton(folder: Path, reference: str, *, dtype: torch.dtype, config: Any = None) -> Any:
    """Build a causal language model whose parameters take no memory, and whose buffers hold what they should.

    Buffers such as rotary frequencies are computed by the modules as they are made, and lie in no checkpoint.

    Args:
        folder: of the model; its weights are not read, its generation settings are.
        reference: what the user called it, for messages.
        dtype: of the parameters.
        config: a transformers configuration in the place of the folder's own.

    Raises:
        DeltaguardError: as `load_config`, or transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder, reference) if config is None else config
    with foreign(f"transformers cannot build the model of {reference}"), _parameters_without_memory():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    model.generation_config = load_generation_config(folder, reference, config)
    return _with_copied_views(model.eval())


def load_generation_config(folder: Path, reference: str, config: Any) -> Any:
    """Load what decides where answers of a model end, as transformers does when it loads the model.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.
        config: its transformers configuration, from which it follows where there is no file of its own.

    Raises:
        DeltaguardError: transformers cannot read it.
    """
    from transformers import GenerationConfig

    with foreign(f"transformers cannot read the generation_config.json of {reference}"):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        return GenerationConfig.from_model_config(config)


@contextmanager
def _parameters_without_memory() -> Generator[None]:
    """Put every parameter onto the meta device as a module takes it."""
    register = nn.Module.register_parameter

    def take(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        empty = None if param is None else nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, empty)

    nn.Module.register_parameter = take
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def module_names(folder: Path) -> tuple[str, ...]:
    """Name all modules of the causal language model that a checkpoint's configuration describes.

    Args:
        folder: of the checkpoint; its weights are not read.

    Raises:
        DeltaguardError: transformers cannot build the model.
    """
    return tuple(name for name, _ in empty_model(folder, str(folder)).named_modules())


def refuse_code(folder: Path, reference: str) -> None:
    """Refuse a model whose files name Python code for transformers to run.

    Raises:
        DeltaguardError: a configuration has an `auto_map` or names other files in its own place, or there is
            code that transformers runs by its name; all of them are listed. Or a configuration cannot be
            read.
    """
    found: list[str] = []
    for name in _ASKING:
        if (folder / name).is_file():
            content = read_json(folder / name, ANY_OBJECT, remedy="Copy it again.")
            code = [str(value) for field, value in _fields(content) if field == "auto_map" and value]
            found += [f"{name} names {', '.join(code)} (`auto_map`)"] if code else []
            found += [f"{name} names other files (`{field}`)" for field in _REDIRECTING if field in content]
    found += [f"there is {name}" for name in _RUN_BY_NAME if (folder / name).exists()]
    if found:
        raise DeltaguardError(
            listed(f"{reference} asks for code or files of its own, which deltaguard never follows", found)
            + "\nIf transformers knows the model without them, remove these fields from the files."
        )


def _refuse_giants(folder: Path, reference: str) -> None:
    """Refuse a model whose configuration asks for more layers than any model has."""
    path = folder / "config.json"
    if not path.is_file():
        return
    found = [
        f"`{name}` is {shortened(str(value), _SHOWN_DIGITS)}"
        for name, value in _fields(read_json(path, ANY_OBJECT, remedy="Copy it again."))
        if isinstance(value, int | float) and value > MOST_PARTS and name.endswith(_COUNTED)
    ]
    if found:
        raise DeltaguardError(
            listed(f"The config.json of {reference} asks for more than {MOST_PARTS:,} parts of a kind", found)
            + "\nCopy it again from where the model comes from."
        )


def _fields(content: Any) -> Iterator[tuple[str, Any]]:
    """Each field of a JSON document with its value, at any depth."""
    if isinstance(content, list):
        for value in content:
            yield from _fields(value)
    if isinstance(content, dict):
        for name, value in content.items():
            yield name, value
            yield from _fields(value)


def vocabulary_size(folder: Path) -> int | None:
    """Count the tokens of a tokenizer: one more than its largest id, added tokens included.

    Args:
        folder: a model's or adapter's folder.

    Returns:
        The number, of `tokenizer.json` or else of `vocab.json` and `added_tokens.json`; None where there is
        neither, or no vocabulary in it.

    Raises:
        DeltaguardError: the file cannot be read, or holds something else.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _older_vocabulary_size(folder)
    tokenizer = read_json(path, _Tokenizer, remedy="Copy it again.")
    vocabulary = tokenizer.model.vocab
    if vocabulary is None:
        return None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.id for token in tokenizer.added_tokens]
    return max(ids, default=-1) + 1


def _older_vocabulary_size(folder: Path) -> int | None:
    """Count the tokens of the files that tokenizers had before they were one."""
    if not (folder / "vocab.json").is_file():
        return None
    paths = [path for name in ("vocab.json", "added_tokens.json") if (path := folder / name).is_file()]
    known = [read_json(path, _IDS, remedy="Copy it again.") for path in paths]
    return max((number for ids in known for number in ids.values()), default=-1) + 1
