"""The benchmark behind scripts/bench: rows measured side by side with their references, on one machine."""
