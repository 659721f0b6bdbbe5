"""An effect that sees whether its intent is in the journal: one line "HOST intended" (or "HOST unforeseen") a time."""

import json
import os
import sqlite3
import sys
import time
from pathlib import Path

journal, run, task, host, effects, slow = sys.argv[1:]
rows = sqlite3.connect(f"file:{journal}?mode=ro", uri=True).execute(
    "SELECT data FROM journal WHERE run = ? AND kind = 'effect_intended'", (run,)
)
intents = [json.loads(data) for (data,) in rows]
seen = any(intent["task"] == task and intent["host"] == host for intent in intents)
with Path(effects).open("a", encoding="utf-8") as stream:
    stream.write(f"{host} {'intended' if seen else 'unforeseen'}\n")
if float(slow) and host == "here1" and not Path(effects).with_name("go").exists():
    Path(effects).with_name("working").write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(float(slow))
