"""Keep the steps that a run has finished, and continue a dead run from them."""
