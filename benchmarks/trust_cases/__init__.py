"""What `benchmarks/trust.py` measures, a module for each kind of promise."""
