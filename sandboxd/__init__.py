"""The control-plane daemon: sandboxes for agents behind one HTTP API."""
