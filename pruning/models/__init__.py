"""Models: architectures, loading, and streaming from checkpoint shards."""
