"""HyperDHT for Python: peers find each other by public key and talk over encrypted streams.

Wire-compatible with the npm package `hyperdht` 6.34. `HyperDHT` is the way in; `Connection` and `Server` are what it
gives. Every error is a `HyperDHTError`.
"""
