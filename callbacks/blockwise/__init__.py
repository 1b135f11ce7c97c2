"""The parts of BlockwisePruning: settings, one block, targets, records, results."""
