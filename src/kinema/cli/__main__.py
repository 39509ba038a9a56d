"""`python -m kinema.cli`, for where the `kinema` command is not on the path."""

import sys

from kinema.cli import main

if __name__ == "__main__":
    sys.exit(main())
