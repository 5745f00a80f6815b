"""Runs migrations on the connection that `Database.migrate` opened, in its one transaction."""

from alembic import context

from sandboxd.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
