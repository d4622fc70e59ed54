"""The tables of the service. A change of them is a new file in `migrations/versions`."""

import time
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

UNFINISHED = ("validating_files", "queued", "running", "paused")
"""States of a job that will change."""

DECISIONS = ("released", "discarded")
"""What an operator decides about a model that the gate blocked."""


def now() -> int:
    """Tell the time as the API does, in whole seconds since 1970."""
    return int(time.time())


class Table(DeclarativeBase):
    """What all tables have.

    Attributes:
        number: counts rows in the order in which they were made, which is the order of lists.
        id: what customers call it.
        created_at: seconds since 1970.
    """

    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=True, sort_order=-3)
    id: Mapped[str] = mapped_column(String(64), unique=True, sort_order=-2)
    created_at: Mapped[int] = mapped_column(default=now, sort_order=-1)


class Owner(Table):
    """The data folder that a database belongs to, by the id of its service; one row."""

    __tablename__ = "owners"


class Key(Table):
    """A key of an organisation; the key itself is stored nowhere.

    Attributes:
        organisation: that it speaks for.
        sha256: of the key.
        hint: its last characters, by which people recognise it.
        revoked_at: since when it is not taken any more.
        is_operator: whether its holder runs the service, and decides about blocked models.
    """

    __tablename__ = "keys"

    organisation: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(8))
    revoked_at: Mapped[int | None]
    is_operator: Mapped[bool] = mapped_column(default=False)


class SignIn(Table):
    """Somebody who signed in to the page; the token that their browser keeps is stored nowhere.

    Attributes:
        sha256: of the token.
        key_id: of the key that they showed.
        expires_at: when it ends, in seconds since 1970.
    """

    __tablename__ = "sign_ins"

    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    key_id: Mapped[str] = mapped_column(ForeignKey("keys.id"))
    expires_at: Mapped[int]


class File(Table):
    """An upload, or what a job wrote; its content lies in the data folder under its id.

    Attributes:
        organisation: whose it is.
        name: as it was given; never the name of anything on disk.
        purpose: `fine-tune` or `fine-tune-results`.
        bytes: its size.
    """

    __tablename__ = "files"

    organisation: Mapped[str] = mapped_column(String(64), index=True)
    name: Mapped[str] = mapped_column(String(512))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int] = mapped_column(BigInteger)


class Job(Table):
    """A fine-tuning job.

    Attributes:
        organisation: whose it is.
        status: one of OpenAI's, or `paused`.
        model: the aligned model's name.
        method: `supervised` or `dpo`.
        training_file: its id.
        validation_file: its id.
        hyperparameters: numbers, none of them `auto`; with `trained_weights`.
        seed: of the training.
        suffix: part of the name of its model.
        user_metadata: the customer's own.
        fine_tuned_model: the name under which it was published.
        trained_tokens: of all epochs.
        result_file: id of the file with its metrics.
        error: `code`, `message` and `param` where it failed.
        finished_at: seconds since 1970.
        review: `waiting` where the gate blocked its model, then `released` or `discarded`.
        runs: how often it was begun; a pause ends a run.
        request_sha256: of what was asked for and by which key.
        idempotency_key: the client's own, with the organisation's name before it.
    """

    __tablename__ = "jobs"

    organisation: Mapped[str] = mapped_column(String(64), index=True)
    status: Mapped[str] = mapped_column(String(32), index=True)
    model: Mapped[str] = mapped_column(String(100))
    method: Mapped[str] = mapped_column(String(16), default="supervised")
    training_file: Mapped[str] = mapped_column(String(64))
    validation_file: Mapped[str | None] = mapped_column(String(64))
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSON)
    seed: Mapped[int]
    suffix: Mapped[str | None] = mapped_column(String(64))
    user_metadata: Mapped[dict[str, str] | None] = mapped_column(JSON)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(300))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_file: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    finished_at: Mapped[int | None]
    review: Mapped[str | None] = mapped_column(String(16), index=True)
    runs: Mapped[int] = mapped_column(default=1)
    request_sha256: Mapped[str] = mapped_column(String(64), index=True)
    idempotency_key: Mapped[str | None] = mapped_column(String(400), unique=True)


class Event(Table):
    """Something that happened to a job.

    Attributes:
        job_id: of the job.
        once: names what happened, so that a step that runs again does not tell it twice.
        level: `info`, `warn` or `error`.
        message: in words.
        type: `message`, `metrics` or `moderation_checks`.
        data: the same for programs.
    """

    __tablename__ = "events"
    __table_args__ = (UniqueConstraint("job_id", "once"), Index("events_of_job", "job_id", "number"))

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    once: Mapped[str] = mapped_column(String(100))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(String(4000))
    type: Mapped[str] = mapped_column(String(32))
    data: Mapped[dict[str, Any] | None] = mapped_column(JSON)


class Model(Table):
    """A model that passed the gate; its id is the name that customers use.

    Attributes:
        organisation: whose it is.
        base: name of the aligned model that it is over.
        job_id: of the job that made it; its folder in the data folder holds the weights.
        step: number of training steps.
    """

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(300), unique=True, sort_order=-2)
    organisation: Mapped[str] = mapped_column(String(64), index=True)
    base: Mapped[str] = mapped_column(String(100))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), unique=True)
    step: Mapped[int]
