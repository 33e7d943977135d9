"""Chapter 11: many users. Queues, paged memory, a scheduler, an engine, and a server that real clients use."""
