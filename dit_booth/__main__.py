"""``python -m dit_booth``, the same as the console script ``dit-booth``."""

import sys

from dit_booth.cli import main

if __name__ == "__main__":
    sys.exit(main())
