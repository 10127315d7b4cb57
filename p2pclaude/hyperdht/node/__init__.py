"""A node of the DHT: its table of others, walks towards a target, upkeep, and what others see of it."""
