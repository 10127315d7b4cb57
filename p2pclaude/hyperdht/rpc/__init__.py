"""Requests and answers between nodes of the DHT: their bytes, and the engine that sends, repeats and matches them."""
