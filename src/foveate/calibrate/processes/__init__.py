"""Calibration that several processes share, on one machine or many: they divide the data, and then the weights."""
