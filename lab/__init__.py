"""The embedded environment: two regions and a witness on one machine, with real parts."""
