"""`python -m fastarat` is `fastarat`."""

import sys

from fastarat.cli import main

if __name__ == "__main__":
    sys.exit(main())
