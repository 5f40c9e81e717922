"""What a training step holds in memory, moment by moment."""
