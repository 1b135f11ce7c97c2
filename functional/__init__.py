"""Pure functions and small dataclasses on tensors: the mathematics of the project. Imports torch and nothing above it."""
