"""Sessions: the table of them, the life of one, its journal and inbox, what it asks, and claude as a child process."""
