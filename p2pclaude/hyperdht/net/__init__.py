"""Datagrams in and out: the kernel's sockets, which datagram goes where, and the table of streams (ring 2)."""
