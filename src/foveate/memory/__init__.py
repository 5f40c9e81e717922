"""Where planes live in memory, and how much of it is free."""
