"""Speed against a floor of the same run: the same gRPC hops and SQLite commits with nothing of ours in them."""
