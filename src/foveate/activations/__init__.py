"""What a model keeps between forward and backward, and between one token and the next, in fewer bits."""
