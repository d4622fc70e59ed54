"""Keys of operators, what becomes of blocked models, and methods of training."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns; keys that exist are customers', and jobs that exist are supervised."""
    op.add_column("keys", sa.Column("is_operator", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("jobs", sa.Column("review", sa.String(16)))
    method = sa.Column("method", sa.String(16), nullable=False, server_default="supervised")
    op.add_column("jobs", method)
    op.create_index("ix_jobs_review", "jobs", ["review"])
