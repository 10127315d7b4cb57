"""The commands, one module each; nothing is imported here so that a tool loads only what it uses."""
