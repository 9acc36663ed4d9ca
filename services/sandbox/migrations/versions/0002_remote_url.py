"""A sandbox knows its remote.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema forward."""
    with op.batch_alter_table("sandboxes", schema=None) as batch_op:
        batch_op.add_column(sa.Column("remote_url", sa.String(), server_default="", nullable=False))


def downgrade() -> None:
    """Take the schema back."""
    with op.batch_alter_table("sandboxes", schema=None) as batch_op:
        batch_op.drop_column("remote_url")
