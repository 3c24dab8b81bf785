"""What the system costs and gains, measured side by side; run by `jobs/benchmark.py`."""
