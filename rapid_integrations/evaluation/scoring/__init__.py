"""From an answer to a score, and from scores to a mean with its confidence interval."""
