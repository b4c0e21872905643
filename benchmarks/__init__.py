"""The stages of benchmark.py."""
