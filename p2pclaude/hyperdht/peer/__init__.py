"""Peers: finding a server, shaking hands with it, serving clients, punching holes, and the ways a stream can take."""
