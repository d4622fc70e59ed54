"""Models and tokenizers through transformers: no code from a model's folder runs, and nothing is asked."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deltaguard.errors import DeltaguardError
from deltaguard.models.code import refuse_code
from deltaguard.models.giants import refuse_giants
from deltaguard.models.vocabulary import MOST_TOKENS

_SHOWN_CHARACTERS = 2000


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
        shown = reason if len(reason) <= _SHOWN_CHARACTERS else f"{reason[:_SHOWN_CHARACTERS]}..."
        raise kind(f"{what}: {shown}") from error


def load_config(folder: Path, reference: str) -> Any:
    """Load a model's configuration.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: the folder asks for code of its own, or transformers cannot load the configuration.
    """
    from transformers import AutoConfig

    refuse_code(folder, reference)
    refuse_giants(folder, reference)
    with foreign(f"transformers cannot read the configuration of {reference}"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def load_tokenizer(folder: Path, reference: str) -> Any:
    """Load a model's tokenizer.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: the folder asks for code of its own, or transformers cannot load the tokenizer.
    """
    from transformers import AutoTokenizer

    refuse_code(folder, reference)
    refuse_giants(folder, reference)
    with foreign(f"transformers cannot load the tokenizer of {reference}"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
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
        DeltaguardError: the folder asks for code of its own, or transformers cannot load the model.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    refuse_code(folder, reference)
    refuse_giants(folder, reference)
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    given = {} if config is None else {"config": config}
    with foreign(f"transformers cannot load {reference}"):
        model: Any = kind.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=False,
            use_safetensors=True,
            **given,
        )
    return model.eval()


def empty_model(folder: Path, reference: str) -> Any:
    """Build the causal language model that a configuration describes, without weights.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: as `load_config`, or transformers cannot build the model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder, reference)
    with foreign(f"transformers cannot build the model of {reference}"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
