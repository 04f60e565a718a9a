"""Run by Alembic, on the connection and inside the transaction that `Database` hands over."""

from alembic import context

from adapters.storage.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
