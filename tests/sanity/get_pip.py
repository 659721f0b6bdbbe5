"""Stands in for the get-pip script that ansible-test downloads, where only package registries can be reached.

Same contract: called in an empty virtual environment with pip's own requirement arguments.
"""

from __future__ import annotations

import ensurepip
import runpy
import sys

NOT_PIPS = {"--no-setuptools", "--no-wheel"}

ensurepip.bootstrap()
sys.argv = ["pip", "install", *(argument for argument in sys.argv[1:] if argument not in NOT_PIPS)]
runpy.run_module("pip", run_name="__main__")
