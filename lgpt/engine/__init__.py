"""The one door to DeepSpeed: start the ranks, build an engine, ask all ranks something."""
