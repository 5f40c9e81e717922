"""The ops on bit planes: schema, meaning in plain torch."""
