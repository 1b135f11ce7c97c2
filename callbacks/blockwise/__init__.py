"""The parts of BlockwisePruning: settings, one block, quotas, records, results."""
