"""From prompts to tokens to pictures."""
