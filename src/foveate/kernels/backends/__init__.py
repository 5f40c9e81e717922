"""Which backend runs the ops on which device, and why the others do not."""
