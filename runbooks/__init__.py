"""Runbooks of censuschat.infra: definitions (YAML) run step by step, each step one idempotent playbook.

``cli`` is the command line; ``definition`` reads what a runbook is; ``environment`` reads where it runs; ``preflight``
refuses before anything is touched; ``engine`` runs and resumes; ``step`` runs one playbook through ansible-runner;
``journal`` remembers; ``progress`` shows; ``ledger`` measures; ``report`` tells.
"""
