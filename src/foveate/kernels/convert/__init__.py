"""The ops that change the form of what moves: schema, meaning in plain torch."""
