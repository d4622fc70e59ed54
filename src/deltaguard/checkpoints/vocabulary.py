"""How many tokens a model's tokenizer knows; its embeddings may have more rows, as padding."""

from pathlib import Path

from deltaguard.checkpoints.layout import read_json


def vocabulary_size(folder: Path) -> int | None:
    """One more than the largest token id of `tokenizer.json`, added tokens included.

    Args:
        folder: a model's or adapter's folder.

    Returns:
        The number, or None where there is no `tokenizer.json` or its vocabulary is no map or list.

    Raises:
        DeltaguardError: the file is no JSON.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = read_json(path)
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocabulary, dict):
        ids = [int(token) for token in vocabulary.values()]
    elif isinstance(vocabulary, list):  # Unigram: pairs of token and score
        ids = [len(vocabulary) - 1]
    else:
        return None
    ids += [int(token["id"]) for token in tokenizer.get("added_tokens", [])]
    return max(ids, default=-1) + 1
