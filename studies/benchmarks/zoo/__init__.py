"""Models as their users call them, one of every family, and what is tried on each."""
