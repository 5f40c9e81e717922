"""What is done to a float model before it is quantized."""
