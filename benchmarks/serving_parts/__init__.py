"""The parts of benchmarks/serving.py: each measures one thing and has a table of it."""
