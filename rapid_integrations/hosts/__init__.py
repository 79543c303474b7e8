"""The parts that the classes for both frameworks share: fields, loading, calls and prompts."""
