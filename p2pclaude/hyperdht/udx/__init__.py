"""UDX, the reliable stream transport under HyperDHT connections, without I/O (ring 1)."""
