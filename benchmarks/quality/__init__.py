"""What low precision costs real models: of weights, of inputs, of key/value caches."""
