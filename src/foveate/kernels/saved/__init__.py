"""The ops on what autograd saves for backward: schema, meaning in plain torch."""
