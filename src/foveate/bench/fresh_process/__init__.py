"""Work in a process of its own, so that what it takes of memory and of the disk is its own."""
