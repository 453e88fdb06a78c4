"""The one door to DeepSpeed."""
