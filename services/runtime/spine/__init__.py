"""The spine: state is pushed up and watched down, and nothing is lost on the way.

A change marks its entity in the `outbox` in the same transaction. `push` carries the outbox to the coordinator over
one long-lived stream, `courier` carries it down to a child by unary calls, in lanes. `ingest` applies what children
push, `index` holds it in index tables and numbers the changes, `watch` serves snapshot-then-changes over an index or
a replica of one, and `tokens` names positions. `commands` does each command once; `resources` keeps messages in tables.
"""
