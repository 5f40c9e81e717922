"""Real trainings with compressed activations: their final loss, the memory saved, and whether stated bounds hold."""
