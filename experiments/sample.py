"""Sample videos from a finished run, the same as ``dit-booth sample``; see `dit_booth.commands.sample`.

python experiments/sample.py runs/RUN --reference shuffled --seeds 0 1 2
python experiments/sample.py runs/RUN --image path/to/image_or_folder --caption "a panda is running" --subject panda
"""

import sys

from dit_booth.commands.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
