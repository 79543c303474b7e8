"""Models: loading, the self-check, and forward passes over packed batches."""
