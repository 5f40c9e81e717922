"""Real models, and the data that they are calibrated and judged on."""
