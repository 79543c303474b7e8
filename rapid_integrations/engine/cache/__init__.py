"""Key/value caches: sequences, prefixes in memory and on disk, prompts that share a prefix."""
