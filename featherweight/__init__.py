"""Featherweight: make a trained network cheaper to run, and prove that it still does its job."""
