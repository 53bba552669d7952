"""What is fast, and by how much: each module is run as ``python -m benchmarks.NAME --json``."""
