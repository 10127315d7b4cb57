"""A node of the DHT by itself: what p2pclaude-node runs."""
