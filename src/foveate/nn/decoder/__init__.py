"""Fused decoders: all blocks of a decoder of transformers in one op."""
