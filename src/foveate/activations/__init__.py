"""What autograd saves for backward, and caches: how many bits each tensor is stored with, and what that costs."""
