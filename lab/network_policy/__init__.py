"""The lab's network agent: pod routes and NetworkPolicy of one Kubernetes node, from the objects of its API.

It runs on the nodes with Debian 12's Python 3.11 and nothing but the standard library.
"""
