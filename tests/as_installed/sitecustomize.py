"""Programs that tests start see what a user has installed: without the tests' oracle, whose import takes seconds."""

import sys

for name in ("transformers", "peft"):  # peft needs transformers, and diffusers imports it where it is
    sys.modules[name] = None  # type: ignore[assignment]  # as if it were not there
