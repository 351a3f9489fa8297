"""Benchmarks: what is measured, as plain data; the command `syncbn-bench` prints it."""
