"""Remote control of Claude Code sessions over HyperDHT: a daemon and one-shot Unix tools."""

__version__ = "0.1.0"
