"""A whole quantized model in a folder: `save` and `load`."""
