"""Safe encoding of untrusted text, streaming detokenization, stop strings, cached pieces of long texts."""
