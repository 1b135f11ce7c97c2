"""Helpers that belong to no single package: digests, model paths, safe reading, optional packages."""
