"""The ops that statistics of a calibration are made of: schema, meaning in plain torch."""
