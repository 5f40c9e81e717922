"""Sensors of the machine, and how any sensor is read without being trusted."""
