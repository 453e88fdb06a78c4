"""What a run will cost, counted from its settings without torch."""
