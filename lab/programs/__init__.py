"""The programs of Kubernetes and the images made of them, one complete set a version in the project's cache.

from lab import programs

programs.prepare("1.35")   # downloads or builds what is missing
place = programs.ready("1.35")   # <cache>/kubernetes/v1.35.4 with bin/, images/ and SHA256SUMS
programs.versions("1.35")["etcd"]   # "3.6.6"
"""

from __future__ import annotations

from lab.programs.catalogue import ProgramsError, Unknown, Unprepared, versions
from lab.programs.store import prepare, ready

__all__ = ["ProgramsError", "Unknown", "Unprepared", "prepare", "ready", "versions"]
