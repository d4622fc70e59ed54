"""Bytes of files and trained tokens may be more than 32 bits hold."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Widen the columns; in SQLite every number is as wide as it must be."""
    if op.get_bind().dialect.name == "sqlite":
        return
    for table, column in (("files", "bytes"), ("jobs", "trained_tokens")):
        op.alter_column(table, column, type_=sa.BigInteger())
