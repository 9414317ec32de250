"""Encoding more rows than memory holds: an input cut into shards, each encoded and written by itself, on an engine."""
