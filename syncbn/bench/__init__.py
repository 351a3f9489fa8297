"""Benchmarks of the command ``syncbn-bench``."""
