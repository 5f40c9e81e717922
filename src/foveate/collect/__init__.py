"""Running statistics by hooks: what the sensitivity of weights and inputs is computed from."""
