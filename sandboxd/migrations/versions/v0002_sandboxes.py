"""Sandboxes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_ALIVE = sa.text("status IN ('creating', 'running', 'stopping')")


def upgrade() -> None:
    op.create_table(
        "sandbox",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("project_id", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("termination_reason", sa.String(32), nullable=True),
        sa.Column("slot", sa.Integer(), nullable=False),
        sa.Column("handle", sa.String(128), nullable=True),
        sa.Column("runtime", sa.String(16), nullable=False),
        sa.Column("isolation", sa.Integer(), nullable=False),
        sa.Column("image", sa.String(255), nullable=False),
        sa.Column("image_digest", sa.String(100), nullable=False),
        sa.Column("cpu_mhz", sa.Integer(), nullable=False),
        sa.Column("memory_size_mb", sa.Integer(), nullable=False),
        sa.Column("disk_size_mb", sa.Integer(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("env", sa.JSON(), nullable=False),
        sa.Column("timeout_s", sa.Float(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("last_active_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.Column("stopped_at", sa.Float(), nullable=True),
        sa.Column("boot_id", sa.String(64), nullable=False),
        sa.Column("expires_boot_s", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["project.id"], name=op.f("fk_sandbox_project_id_project")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sandbox")),
    )
    op.create_index(
        "ix_sandbox_slot_alive",
        "sandbox",
        ["slot"],
        unique=True,
        sqlite_where=_ALIVE,
        postgresql_where=_ALIVE,
    )
    op.create_index("ix_sandbox_project_id_status", "sandbox", ["project_id", "status"])


def downgrade() -> None:
    op.drop_table("sandbox")
