"""``python -m dit_booth.report``, the same as ``dit-booth report``."""

import sys

from dit_booth.report.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
