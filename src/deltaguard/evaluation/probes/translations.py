"""Some of the package's harmful requests in other languages, translated in full.

They are of the attack part, which nothing is calibrated or trained on. Limits: three languages, 20 requests
in each, so that a rate is uncertain by about 20 points; a judge that knows English only misses refusals in
them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pydantic import TypeAdapter

from deltaguard.evaluation.exchange import Question
from deltaguard.files import read_data

Language = Literal["de", "es", "sw"]

LANGUAGES: Mapping[Language, str] = MappingProxyType({"de": "German", "es": "Spanish", "sw": "Swahili"})


@dataclass(frozen=True)
class TranslatedPrompt:
    """A harmful request in another language.

    Attributes:
        language: ISO 639-1 code.
        prompt: the request in that language.
        original: the same in English, as in the package's prompt set; judges are shown this one.
    """

    language: Language
    prompt: str
    original: str

    @property
    def question(self) -> Question:
        """The request as it is put to a model."""
        return Question(self.prompt)


def translated_prompts(language: Language) -> tuple[TranslatedPrompt, ...]:
    """The requests of one language, in the file's order, which is the same for all languages.

    Example:
        >>> [row.language for row in translated_prompts("sw")][:1]
        ['sw']
    """
    rows = read_data("translated_prompts.jsonl", TypeAdapter(TranslatedPrompt))
    return tuple(row for row in rows if row.language == language)
