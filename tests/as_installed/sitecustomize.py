"""Programs that tests start see what a user has installed: without the tests' oracle, whose import takes seconds."""

import sys

sys.modules["transformers"] = None  # type: ignore[assignment]  # as if it were not there
