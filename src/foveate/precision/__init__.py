"""Sites, maps, budgets, profiles and frontiers: the frozen values that the stages hand to each other."""
