"""Serving many: queues, paged memory, a scheduler, an engine, and a server that real clients use."""
