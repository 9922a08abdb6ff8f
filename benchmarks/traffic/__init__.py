"""Many requests at once: what they are, who answers them, and what is said of it."""
