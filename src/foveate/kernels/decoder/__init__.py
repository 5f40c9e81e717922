"""The blocks of a decoder in one op."""
