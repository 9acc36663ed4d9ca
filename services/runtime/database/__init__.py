"""The database of one service. A transaction is a plain function, run whole where the database is.

    _PUT = Statement(upsert(notes, ["id"]))                   # module level: compiled once for each dialect

    def rename(tx: Tx, note_id: str, title: str) -> None:    # plain code; may run twice: only database and arguments
        tx.change(_PUT, {"id": note_id, "title": title})

    await database.write(rename, "n1", "A title")             # committed and durable when this returns

On SQLite functions that wait share a commit, each in a savepoint of its own; on PostgreSQL each has a transaction.
What a function gave `tx.after_commit` is called in the event loop, in the order of commits, before its caller goes on.
A caller that is cancelled leaves at once: a function that has not begun never will, one that has ends.
"""

from services.runtime.database.base import Database, open_database
from services.runtime.database.statement import Statement, insert, insert_new, is_in, upsert
from services.runtime.database.transaction import (
    DatabaseBusy,
    DatabaseError,
    DatabaseRefused,
    DatabaseUnavailable,
    Raced,
    Reader,
    Tx,
)

__all__ = [
    "Database",
    "DatabaseBusy",
    "DatabaseError",
    "DatabaseRefused",
    "DatabaseUnavailable",
    "Raced",
    "Reader",
    "Statement",
    "Tx",
    "insert",
    "insert_new",
    "is_in",
    "open_database",
    "upsert",
]
