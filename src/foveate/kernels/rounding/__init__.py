"""The ops that rounding spends its time in: schema, meaning in plain torch."""
