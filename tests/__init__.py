"""Mirrors the packages; runs offline."""
