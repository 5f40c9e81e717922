"""What runs in the peers' environments: scripts that import nothing of foveate, started by their own Pythons."""
