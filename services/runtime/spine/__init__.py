"""The spine: state is pushed up and watched down, and nothing is lost on the way.

A change marks its entity in the `outbox` in the same transaction. `push` carries the outbox to the coordinator
over one long-lived stream, `courier` carries it down or to a child by unary calls. `ingest` applies what
children push, `index` holds it in index tables and numbers the changes, `watch` serves snapshot-then-changes,
and `tokens` names positions in it. `requests` remembers the answers of commands.
"""
