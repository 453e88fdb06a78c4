"""Run settings: pydantic only, no torch, so that a wrong config is refused in a moment."""
