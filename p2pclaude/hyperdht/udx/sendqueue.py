"""Bytes that were written and not yet cut into packets (ring 1)."""

from collections import deque


class SendQueue:
    """A queue of chunks that gives back bytes in any portions, copied once."""

    __slots__ = ("_chunks", "_offset", "size")

    def __init__(self) -> None:
        self.size = 0  # bytes
        self._chunks: deque[bytes] = deque()
        self._offset = 0  # bytes of the first chunk that are gone

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        if data:
            self._chunks.append(data)
            self.size += len(data)

    def take(self, size: int) -> bytes:
        """Remove and return `size` bytes from the front; there must be as many."""
        self.size -= size
        offset = self._offset
        head = self._chunks[0]
        if len(head) - offset > size:
            self._offset = offset + size
            return head[offset : offset + size]
        if not offset and len(head) == size:
            return self._chunks.popleft()
        return self._gather(size)

    def clear(self) -> None:
        """Drop everything."""
        self._chunks.clear()
        self._offset = self.size = 0

    def _gather(self, size: int) -> bytes:
        """Take bytes that reach to the end of the first chunk or further: small writes share a packet."""
        chunks, offset = self._chunks, self._offset
        parts = []
        while size:
            head = chunks[0]
            part = head[offset : offset + size]
            parts.append(part)
            size -= len(part)
            offset += len(part)
            if offset == len(head):
                chunks.popleft()
                offset = 0
        self._offset = offset
        return parts[0] if len(parts) == 1 else b"".join(parts)
