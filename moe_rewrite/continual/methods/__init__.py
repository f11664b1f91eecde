"""The methods that a Learner is compared with, and the interface of all methods."""
