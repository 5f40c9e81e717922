"""What several commands share: options, data, models, tables and output."""
