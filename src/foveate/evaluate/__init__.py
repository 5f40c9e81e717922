"""What a map truly costs, measured on data."""
