"""Put a model on planes: passes over a small data set in bounded memory, rounding, and the profile."""
