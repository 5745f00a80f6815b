"""The agent: PID 1 of every sandbox. Standard library only, Python 3.8 or newer, mounted read-only."""
