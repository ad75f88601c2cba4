"""Benchmarks: ``python -m bench``, or one module alone as a script."""
