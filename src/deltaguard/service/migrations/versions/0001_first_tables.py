"""The first tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make all tables."""
    op.create_table(
        "keys",
        *_of_all(),
        sa.Column("organisation", sa.String(64), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False, unique=True),
        sa.Column("hint", sa.String(8), nullable=False),
        sa.Column("revoked_at", sa.Integer()),
    )
    op.create_table(
        "files",
        *_of_all(),
        sa.Column("organisation", sa.String(64), nullable=False, index=True),
        sa.Column("name", sa.String(512), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("bytes", sa.Integer(), nullable=False),
    )
    op.create_table(
        "jobs",
        *_of_all(),
        sa.Column("organisation", sa.String(64), nullable=False, index=True),
        sa.Column("status", sa.String(32), nullable=False, index=True),
        sa.Column("model", sa.String(100), nullable=False),
        sa.Column("training_file", sa.String(64), nullable=False),
        sa.Column("validation_file", sa.String(64)),
        sa.Column("hyperparameters", sa.JSON(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("suffix", sa.String(64)),
        sa.Column("user_metadata", sa.JSON()),
        sa.Column("fine_tuned_model", sa.String(300)),
        sa.Column("trained_tokens", sa.Integer()),
        sa.Column("result_file", sa.String(64)),
        sa.Column("error", sa.JSON()),
        sa.Column("finished_at", sa.Integer()),
        sa.Column("runs", sa.Integer(), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False, index=True),
        sa.Column("idempotency_key", sa.String(400), unique=True),
    )
    op.create_table(
        "events",
        *_of_all(),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False),
        sa.Column("once", sa.String(100), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("message", sa.String(4000), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("data", sa.JSON()),
        sa.UniqueConstraint("job_id", "once"),
    )
    op.create_index("events_of_job", "events", ["job_id", "number"])
    op.create_table(
        "models",
        *_of_all(300),
        sa.Column("organisation", sa.String(64), nullable=False, index=True),
        sa.Column("base", sa.String(100), nullable=False),
        sa.Column("job_id", sa.String(64), sa.ForeignKey("jobs.id"), nullable=False, unique=True),
        sa.Column("step", sa.Integer(), nullable=False),
    )


def _of_all(longest_id: int = 64) -> tuple[sa.Column[int] | sa.Column[str], ...]:
    return (
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(longest_id), nullable=False, unique=True),
        sa.Column("created_at", sa.Integer(), nullable=False),
    )
