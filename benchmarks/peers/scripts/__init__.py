"""Scripts that run in the peers' environments with their own Python. They import nothing of foveate."""
