"""The daemon: a connection's requests, the methods they name, its presence in the DHT, and the check before a start."""
