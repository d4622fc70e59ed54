"""Training files in OpenAI's format: what is wrong with them, line by line, and what is learned from them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from deltaguard.errors import DeltaguardError, listed
from deltaguard.files import problems
from deltaguard.finetuning.finetune import Dialogue
from deltaguard.finetuning.preferences import Preference
from deltaguard.service.settings import Limits

RowT = TypeVar("RowT", bound="Example | PreferenceRow")

_MOST_TOLD = 20
_MOST_MESSAGES = 500
_EXAMPLE = (
    'Each line is a JSON object such as {"messages": [{"role": "user", "content": "Hello!"}, {"role": '
    '"assistant", "content": "Hi."}]}.'
)
_PREFERENCE = (
    'Each line is a JSON object such as {"input": {"messages": [{"role": "user", "content": "Hello!"}]}, '
    '"preferred_output": [{"role": "assistant", "content": "Hi."}], "non_preferred_output": [{"role": '
    '"assistant", "content": "What?"}]}.'
)


class InvalidFileError(DeltaguardError):
    """A training or validation file that cannot be learned from."""


def _joined(content: Any) -> Any:
    """Take a content of several parts of text, as OpenAI's format allows, for one text."""
    if isinstance(content, list) and content:
        return "\n".join(part.text for part in _PARTS.validate_python(content))
    return content


class _TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


_PARTS = TypeAdapter(list[_TextPart])


class _Message(BaseModel):
    """A turn; what would change what is learned, such as a call of a tool, is refused, not left out."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined), Field(min_length=1)]
    weight: Literal[0, 1] = 1
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class Example(BaseModel):
    """A line of a training file.

    Raises:
        ValueError: the turns are not a system message, if any, and then user and assistant in turn, the
            assistant last; or none of the assistant's has a weight.
    """

    model_config = ConfigDict(extra="forbid")

    # Every answer is learned with all that comes before it: what is kept grows with the square.
    messages: list[_Message] = Field(min_length=1, max_length=_MOST_MESSAGES)

    @model_validator(mode="after")
    def _check_turns(self) -> "Example":
        roles = [message.plain["role"] for message in self.messages]
        spoken = roles[1:] if roles[0] == "system" else roles
        if not spoken or len(spoken) % 2 or spoken != ["user", "assistant"] * (len(spoken) // 2):
            raise ValueError(
                "the turns must be a system message, if any, then user and assistant in turn, the assistant "
                f"last; they are {', '.join(roles)[:200]}"
            )
        if not any(message.weight for message in self.messages if message.role == "assistant"):
            raise ValueError("every message of the assistant has weight 0, so that there is nothing to learn")
        return self

    @property
    def answers(self) -> int:
        """How many answers are learned."""
        return sum(1 for message in self.messages if message.role == "assistant" and message.weight)

    def dialogues(self) -> list[Dialogue]:
        """Make one dialogue of every answer that has a weight."""
        turns = tuple(message.plain for message in self.messages)
        return [
            Dialogue(turns[:place], message.content)
            for place, message in enumerate(self.messages)
            if message.role == "assistant" and message.weight
        ]


class _Input(BaseModel):
    """What comes before two answers; the fields for tools may say that there are none."""

    model_config = ConfigDict(extra="forbid")

    messages: list[_Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    tools: list[Any] = Field(default=[], max_length=0)
    parallel_tool_calls: bool = True


class _Output(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["assistant"]
    content: Annotated[str, BeforeValidator(_joined), Field(min_length=1)]


class PreferenceRow(BaseModel):
    """A line of a training file for DPO.

    Raises:
        ValueError: the turns are not a system message, if any, and then user and assistant in turn, the user
            last; or both answers are the same.
    """

    model_config = ConfigDict(extra="forbid")

    input: _Input
    preferred_output: list[_Output] = Field(min_length=1, max_length=1)
    non_preferred_output: list[_Output] = Field(min_length=1, max_length=1)

    @model_validator(mode="after")
    def _check_turns(self) -> "PreferenceRow":
        roles = [message.plain["role"] for message in self.input.messages]
        spoken = roles[1:] if roles[0] == "system" else roles
        if len(spoken) % 2 == 0 or spoken != (["user", "assistant"] * len(spoken))[: len(spoken)]:
            raise ValueError(
                "the turns of the input must be a system message, if any, then user and assistant in turn, "
                f"the user last; they are {', '.join(roles)[:200]}"
            )
        if self.preferred_output == self.non_preferred_output:
            raise ValueError("both answers are the same, so that neither is preferred")
        return self

    @property
    def answers(self) -> int:
        """How many pairs of answers are learned."""
        return 1

    def preference(self) -> Preference:
        """Make what is learned from."""
        turns = tuple(message.plain for message in self.input.messages)
        return Preference(turns, self.preferred_output[0].content, self.non_preferred_output[0].content)


def read_examples(path: Path, limits: Limits) -> list[Dialogue]:
    """Read a training file for supervised fine-tuning.

    Args:
        path: JSON lines; empty ones are skipped.
        limits: rows and bytes of a line that are allowed.

    Raises:
        InvalidFileError: lines are wrong (the first 20 are told with their numbers), or there are too many or
            none.
    """
    rows = _read(path, limits, Example, _EXAMPLE)
    return [dialogue for _, row in rows for dialogue in row.dialogues()]


def read_preferences(path: Path, limits: Limits) -> list[Preference]:
    """Read a training file for DPO; the arguments, and what is raised, are those of `read_examples`."""
    return [row.preference() for _, row in _read(path, limits, PreferenceRow, _PREFERENCE)]


def read_answers(path: Path, limits: Limits, *, method: str) -> list[tuple[int, Dialogue]]:
    """Read what a training file has a model say: of preferences the preferred answers.

    Args:
        path: as in `read_examples`.
        limits: likewise.
        method: `supervised` or `dpo`.

    Returns:
        Each answer behind the number of its line.

    Raises:
        InvalidFileError: as `read_examples`.
    """
    if method == "dpo":
        pairs = [(n, row.preference()) for n, row in _read(path, limits, PreferenceRow, _PREFERENCE)]
        return [(number, Dialogue(row.turns, row.preferred)) for number, row in pairs]
    rows = _read(path, limits, Example, _EXAMPLE)
    return [(number, dialogue) for number, row in rows for dialogue in row.dialogues()]


def check_file(path: Path, limits: Limits, *, method: str) -> None:
    """Look for what is wrong with a file, keeping a line of it at a time; as `read_answers` otherwise."""
    rows = (
        _rows(path, limits, PreferenceRow, _PREFERENCE)
        if method == "dpo"
        else _rows(path, limits, Example, _EXAMPLE)
    )
    for _ in rows:
        pass


def _read(path: Path, limits: Limits, schema: type[RowT], remedy: str) -> list[tuple[int, RowT]]:
    return list(_rows(path, limits, schema, remedy))


def _rows(path: Path, limits: Limits, schema: type[RowT], remedy: str) -> Iterator[tuple[int, RowT]]:
    """Read row after row; what is wrong with any of them is raised behind the last."""
    found = 0
    wrong: list[str] = []
    for row, (number, line) in enumerate(_lines(path, limits.line_bytes)):
        if row == limits.file_rows:
            raise InvalidFileError(f"The file has more than {limits.file_rows:,} examples, and may not.")
        if len(wrong) >= _MOST_TOLD:
            break
        try:
            read = schema.model_validate_json(_text(line, limits.line_bytes))
        except ValidationError as error:
            wrong += [f"line {number}: {problem}" for problem in problems(error)]
        except InvalidFileError as error:
            wrong.append(f"line {number}: {error}")
        else:
            found += read.answers
            if found > limits.file_rows:
                most = f"{limits.file_rows:,}"
                raise InvalidFileError(
                    f"More than {most} answers would be learned from the file, and may not."
                )
            yield number, read
    if wrong:
        raise InvalidFileError(f"{listed('The file cannot be learned from', wrong)}\n{remedy}")
    if not found:
        raise InvalidFileError(f"The file has no example. {remedy}")


def _lines(path: Path, longest: int) -> Iterator[tuple[int, bytes]]:
    """Read lines that are not empty; of one that is too long no more than shows it."""
    with path.open("rb") as file:
        number, line = 1, file.readline(longest + 2)
        while line:
            if line.strip():
                yield number, line
            while len(line) == longest + 2 and not line.endswith(b"\n"):
                line = file.readline(longest + 2)
            number, line = number + 1, file.readline(longest + 2)


def _text(line: bytes, longest: int) -> str:
    if len(line.rstrip(b"\r\n")) > longest:
        raise InvalidFileError(f"it has more than {longest:,} bytes")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InvalidFileError(f"byte {byte:#04x} at position {error.start} is no UTF-8") from error
