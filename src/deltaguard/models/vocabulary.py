"""How many tokens a model's tokenizer knows; its embeddings may have more rows, as padding."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from deltaguard.files import read_json

MOST_TOKENS = 1 << 24
"""The largest vocabularies have a tenth of it; tokenizers go through all ids up to the last, used or not."""

_Id = Annotated[int, Field(ge=0, lt=MOST_TOKENS)]


class _Token(BaseModel):
    id: _Id


class _Vocabulary(BaseModel):
    # Unigram lists pairs of token and score; the others map tokens to ids.
    vocab: dict[str, _Id] | list[Any] | None = None


class _Tokenizer(BaseModel):
    model: _Vocabulary = _Vocabulary()
    added_tokens: list[_Token] = []


def vocabulary_size(folder: Path) -> int | None:
    """Count the tokens of `tokenizer.json`: one more than its largest id, added tokens included.

    Args:
        folder: a model's or adapter's folder.

    Returns:
        The number, or None where there is no `tokenizer.json` or it has no vocabulary.

    Raises:
        DeltaguardError: the file cannot be read, or holds something else.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_json(path, _Tokenizer, remedy="Copy it again.")
    vocabulary = tokenizer.model.vocab
    if vocabulary is None:
        return None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token.id for token in tokenizer.added_tokens]
    return max(ids, default=-1) + 1
