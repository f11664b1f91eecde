"""The methods that a Learner is held against, and what all have in common."""
