"""The loop, and one step function a phase."""
