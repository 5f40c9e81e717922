"""The cost of low precision on real models: of weights, of inputs, and of key/value caches."""
