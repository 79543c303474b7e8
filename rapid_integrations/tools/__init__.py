"""Tool calls: the formats models write them in, parsing, and how a call uses tools."""
