"""Pure functions on tensors. Imports torch only."""
