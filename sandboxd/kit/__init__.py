"""Domain-free parts that every slice stands on; imports nothing else of sandboxd."""
