"""An effect: one line a time. Waits at a host that the test holds, and fails at one that it has made too hard."""

import os
import sys
import time
from pathlib import Path

place, host = Path(sys.argv[1]), sys.argv[2]
with (place / "effects").open("a", encoding="utf-8") as stream:
    stream.write(f"{host}\n")
if (place / f"hold-{host}").exists():
    (place / f"working-{host}").write_text(str(os.getpid()))
    end = time.monotonic() + 120
    while not (place / f"go-{host}").exists() and time.monotonic() < end:
        time.sleep(0.05)
sys.exit(1 if (place / f"hard-{host}").exists() else 0)
