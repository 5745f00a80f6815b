"""The daemon's side of the agent protocol, over streams that a runtime dialled."""
