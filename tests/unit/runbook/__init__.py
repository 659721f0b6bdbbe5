"""Runbooks, steps and an inventory for the engine's tests, and a place to run them in."""
