"""Base classes of the modules: pruning by blocks, node tasks, exact resume."""
