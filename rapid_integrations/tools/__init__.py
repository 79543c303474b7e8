"""Tool calls: the formats in which models write them, parsing, and the tools of one request."""
