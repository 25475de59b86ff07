"""Ranks: the processes that decode one model together, of which each holds a shard (tensor parallel)."""
