"""Train the stages of a strategy, sample videos for prompts that training never shows, and measure them.

    deepspeed experiments/run.py --strategy kv_concat
    python experiments/run.py --strategy token_replacement+kv_concat --backbone unet --stages.fine.steps 500

The same as ``dit-booth run``; see `dit_booth.run`.
"""

import sys

from dit_booth.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
