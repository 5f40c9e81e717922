"""Sites, maps, budgets, profiles, timings and frontiers: the frozen values that the stages hand to each other."""
