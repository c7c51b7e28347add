"""How a run ends over what its user can mend: one sentence, once, however many ranks met it."""

import json
import os
import time
from pathlib import Path

PATIENCE = 10.0  # seconds


def wait_to_be_ended() -> None:
    """Ranks but the first of a machine wait before they say what is wrong: torchrun ends them once the first has.

    Where the first did not meet the same, this rank's own words come a little later.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(PATIENCE)


def note_for_torchrun(sentence: str) -> None:
    """Leave the sentence where torchrun looks for the reason, so that its report ends with it and not with a link."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")
