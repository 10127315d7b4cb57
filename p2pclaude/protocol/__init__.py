"""What both sides speak, pure: the pairing URL, sealed lines, permission requests, the session record."""
