"""Campaigns that try to break the commands: seeded, resumable, with a time budget.

From the folder tests: ``python -m stress files --out FOLDER --count 10000 --minutes 60``.
"""
