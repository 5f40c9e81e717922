"""How a saved tensor is packed: encodings, and what each operation's backward needs of it."""
