"""What several commands share: options, data, models, tables, and where words go."""
