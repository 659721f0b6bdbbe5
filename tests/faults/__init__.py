"""Faults of a control plane with three nodes, under clients that count what they lose."""
