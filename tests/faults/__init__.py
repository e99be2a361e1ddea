"""The fault suite: faults of every family that a run may meet, each proven to have fired.

python -m tests.faults --report runs/faults.json [--quick]
"""
