"""The loss of precision maps, measured on data."""
