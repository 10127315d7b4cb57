"""Encryption: the Noise handshake, the secret stream, and the connection that applications read and write."""
