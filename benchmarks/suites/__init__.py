"""The suites of `python -m benchmarks --suite NAME`, each with what it runs in a process of its own."""
