"""Chapter 09: many machines. Ranks that always end, requests over nodes that fail, one model over many devices."""
