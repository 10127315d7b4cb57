"""The tools' side: a connection to a daemon, sessions and permission requests as seen from afar, remembered ways."""
