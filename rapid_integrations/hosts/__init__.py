"""Code that both host frameworks share: fields and loading, calls, arguments and sources."""
