"""What tests share: tiny models, launchers of processes, faults."""
