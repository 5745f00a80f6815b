"""Warm pool, pause, idle timeout, quotas, idempotency keys, exec history, events, audit, usage, nodes."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_OLD_ALIVE = sa.text("status IN ('creating', 'running', 'stopping')")
_ALIVE = sa.text("status IN ('creating', 'ready', 'running', 'paused', 'stopping')")
_INDEXES = {
    "ix_sandbox_project_id_created_at": ["project_id", "created_at", "id"],
    "ix_sandbox_node_id_status": ["node_id", "status"],
    "ix_sandbox_status_slot": ["status", "slot"],
    "ix_sandbox_stopped_at": ["stopped_at"],
}


def upgrade() -> None:
    _upgrade_sandbox()
    with op.batch_alter_table("project") as table:
        table.add_column(sa.Column("max_sandboxes", sa.Integer(), nullable=True))
        table.add_column(sa.Column("max_cpu_mhz", sa.Integer(), nullable=True))
        table.add_column(sa.Column("max_memory_size_mb", sa.Integer(), nullable=True))
    _create_identity_tables()
    _guard_audit_entries()
    _create_sandbox_tables()


def downgrade() -> None:
    for table_name in ("usage_hour", "event", "exec", "node", "audit_entry", "idempotency_key"):
        op.drop_table(table_name)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_entry_stays()")
    with op.batch_alter_table("project") as table:
        for name in ("max_sandboxes", "max_cpu_mhz", "max_memory_size_mb"):
            table.drop_column(name)
    op.execute("DELETE FROM sandbox WHERE project_id IS NULL OR status IN ('ready', 'paused')")
    for index in _INDEXES:
        op.drop_index(index, "sandbox")
    op.drop_index("ix_sandbox_slot_alive", "sandbox")
    with op.batch_alter_table("sandbox") as table:
        for column in _new_columns():
            table.drop_column(column.name)
        table.alter_column("project_id", existing_type=sa.String(64), nullable=False)
    op.create_index(
        "ix_sandbox_slot_alive",
        "sandbox",
        ["slot"],
        unique=True,
        sqlite_where=_OLD_ALIVE,
        postgresql_where=_OLD_ALIVE,
    )


def _new_columns() -> list[sa.Column[Any]]:
    return [
        sa.Column("node_id", sa.String(64), nullable=False, server_default=""),
        sa.Column("engine_instance", sa.String(128), nullable=False, server_default=""),
        sa.Column("pooled_at", sa.Float(), nullable=True),
        sa.Column("idle_timeout_s", sa.Float(), nullable=True),
        sa.Column("last_active_boot_s", sa.Float(), nullable=True),
        sa.Column("remaining_s", sa.Float(), nullable=True),
        sa.Column("metered_at", sa.Float(), nullable=True),
        sa.Column("cpu_read_s", sa.Float(), nullable=False, server_default="0"),
    ]


def _upgrade_sandbox() -> None:
    op.drop_index("ix_sandbox_slot_alive", "sandbox")
    with op.batch_alter_table("sandbox") as table:
        table.alter_column("project_id", existing_type=sa.String(64), nullable=True)
        for column in _new_columns():
            table.add_column(column)
    op.create_index(
        "ix_sandbox_slot_alive",
        "sandbox",
        ["slot"],
        unique=True,
        sqlite_where=_ALIVE,
        postgresql_where=_ALIVE,
    )
    for name, columns in _INDEXES.items():
        op.create_index(name, "sandbox", columns)


def _create_identity_tables() -> None:
    op.create_table(
        "idempotency_key",
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("scope", sa.String(32), nullable=False),
        sa.Column("key", sa.String(255), nullable=False),
        sa.Column("request_sha256", sa.String(64), nullable=False),
        sa.Column("resource_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id"], ["project.id"], name=op.f("fk_idempotency_key_project_id_project")
        ),
        sa.PrimaryKeyConstraint("project_id", "scope", "key", name=op.f("pk_idempotency_key")),
    )
    op.create_index("ix_idempotency_key_created_at", "idempotency_key", ["created_at"])
    op.create_table(
        "audit_entry",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("actor", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("resource_id", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("client", sa.String(64), nullable=True),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_entry")),
    )
    op.create_index("ix_audit_entry_project_id_id", "audit_entry", ["project_id", "id"])


def _guard_audit_entries() -> None:
    # Triggers go with their table: a later migration that rebuilds it (batch mode) has to make them again.
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION audit_entry_stays() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'audit entries are never changed' "
            "USING ERRCODE = 'restrict_violation'; END $$"
        )
        op.execute(
            "CREATE TRIGGER audit_entry_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_entry "
            "FOR EACH STATEMENT EXECUTE FUNCTION audit_entry_stays()"
        )
        return
    for verb in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER audit_entry_no_{verb.lower()} BEFORE {verb} ON audit_entry "
            "BEGIN SELECT RAISE(ABORT, 'audit entries are never changed'); END"
        )


def _create_sandbox_tables() -> None:
    op.create_table(
        "exec",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("sandbox_id", sa.String(64), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("signal", sa.String(16), nullable=True),
        sa.Column("error_name", sa.String(100), nullable=True),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("duration_ms", sa.Float(), nullable=True),
        sa.Column("cpu_ms", sa.Float(), nullable=False),
        sa.Column("max_rss_mb", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_exec")),
    )
    op.create_index("ix_exec_sandbox_id_started_at", "exec", ["sandbox_id", "started_at"])
    op.create_index("ix_exec_started_at", "exec", ["started_at"])
    op.create_table(
        "event",
        # The order in which events were committed; a random part in an id would not have it.
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("sandbox_id", sa.String(64), nullable=False),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_event")),
        sa.UniqueConstraint("id", name=op.f("uq_event_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_event_project_id_sequence", "event", ["project_id", "sequence"])
    op.create_index("ix_event_sandbox_id_sequence", "event", ["sandbox_id", "sequence"])
    op.create_index("ix_event_created_at", "event", ["created_at"])
    op.create_table(
        "usage_hour",
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("sandbox_s", sa.Float(), nullable=False),
        sa.Column("cpu_s", sa.Float(), nullable=False),
        sa.Column("bytes_in", sa.BigInteger(), nullable=False),
        sa.Column("bytes_out", sa.BigInteger(), nullable=False),
        sa.Column("execs", sa.BigInteger(), nullable=False),
        sa.Column("sandboxes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("project_id", "hour", name=op.f("pk_usage_hour")),
    )
    op.create_table(
        "node",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("url", sa.String(255), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_node")),
    )
