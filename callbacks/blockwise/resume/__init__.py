"""What a dead run leaves, and how the next one goes on."""
