"""`python -m sandboxd`."""

import sys

from sandboxd.main import main

if __name__ == "__main__":
    sys.exit(main())
