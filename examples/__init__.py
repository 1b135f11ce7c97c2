"""Examples in Python, without the command line: python -m examples.<name>."""
