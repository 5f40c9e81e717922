"""Real trainings with compressed activations: where they end, what they save, and whether stated bounds hold."""
