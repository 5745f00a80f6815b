"""What execs were, contexts, background execs; secrets that all daemons on one store share."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("exec") as table:
        table.add_column(sa.Column("title", sa.String(200), nullable=False, server_default=""))
        table.add_column(sa.Column("context_id", sa.String(64), nullable=True))
        table.add_column(sa.Column("background", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "secret",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("value", sa.String(128), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_secret")),
    )


def downgrade() -> None:
    op.drop_table("secret")
    with op.batch_alter_table("exec") as table:
        for name in ("background", "context_id", "title"):
            table.drop_column(name)
