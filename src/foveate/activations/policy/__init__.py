"""How many bits each saved tensor gets, and when that is measured anew."""
