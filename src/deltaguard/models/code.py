"""Models that bring code of their own: such code would run on this machine, so they are refused."""

from pathlib import Path
from typing import Any

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import ANY_OBJECT, read_json

_ASKING = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "adapter_config.json",
)
# Fields that send transformers to other files than those that are looked at here.
_REDIRECTING = ("configuration_files", "fast_tokenizer_files")
# What transformers runs without being asked by a configuration.
_RUN_BY_NAME = ("custom_generate/generate.py",)


def refuse_code(folder: Path, reference: str) -> None:
    """Refuse a model whose files name Python code for transformers to run.

    Args:
        folder: of the model.
        reference: what the user called it, for messages.

    Raises:
        DeltaguardError: a configuration has an `auto_map` or names other files in its own place, or there is
            code that transformers runs by its name; all of them are listed. Or a configuration cannot be
            read.
    """
    found: list[str] = []
    for name in _ASKING:
        if (folder / name).is_file():
            content = read_json(folder / name, ANY_OBJECT, remedy="Copy it again.")
            found += [f"{name} names {code} (`auto_map`)"] if (code := _code_in(content)) else []
            found += [f"{name} names other files (`{field}`)" for field in _REDIRECTING if field in content]
    found += [f"there is {name}" for name in _RUN_BY_NAME if (folder / name).exists()]
    if found:
        raise DeltaguardError(
            listed(f"{reference} asks for code or files of its own, which deltaguard never follows", found)
            + "\nIf transformers knows the model without them, remove these fields from the files."
        )


def _code_in(content: Any) -> str:
    """The code that a configuration names, at any depth; empty where it names none."""
    if isinstance(content, dict):
        own = content.get("auto_map")
        named = [str(own)] if own else []
        return ", ".join([*named, *(code for value in content.values() if (code := _code_in(value)))])
    if isinstance(content, list):
        return ", ".join(code for value in content if (code := _code_in(value)))
    return ""
