"""Sandboxes: their life cycle, and what runs and lies in them."""
