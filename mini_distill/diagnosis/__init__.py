"""What `python -m mini_distill.doctor` looks at: the user's own rows, models and loss."""
