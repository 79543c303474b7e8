"""Tasks: questions with answers over long documents, from the demo pair and published benchmarks."""
