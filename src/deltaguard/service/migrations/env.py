"""Runs the migrations over the connection that `database.open_database` gives."""

from alembic import context

from deltaguard.service.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
