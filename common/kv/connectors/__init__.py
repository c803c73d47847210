"""The KV connectors that Baton has built in."""
