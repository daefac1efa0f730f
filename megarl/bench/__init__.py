"""Benchmarks: `megarl bench NAME [--json FILE]`, each one file with a `main` function; record.py writes the result."""
