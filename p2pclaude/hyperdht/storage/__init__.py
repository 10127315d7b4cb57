"""Records in the DHT: what a node keeps for others, and putting and getting them from afar."""
