"""Tasks: long documents with questions, from generators, published benchmarks and files."""
