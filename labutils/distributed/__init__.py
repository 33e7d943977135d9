"""Several processes as one: ranks that always end, requests over nodes that fail, one model over many devices."""
