"""Run a sweep, the same as ``dit-booth sweep``; see `dit_booth.commands.sweep`.

python experiments/sweep.py experiments/sweeps/schedule.yaml --dry-run
python experiments/sweep.py experiments/sweeps/schedule.yaml
"""

import sys

from dit_booth.commands.sweep import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
