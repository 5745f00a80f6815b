"""How a sandbox is made and ended, behind one contract (base.py); one folder per driver."""
