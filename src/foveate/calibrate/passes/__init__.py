"""The passes over a calibration set."""
