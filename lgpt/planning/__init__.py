"""Parameters, memory and time, counted without torch."""
