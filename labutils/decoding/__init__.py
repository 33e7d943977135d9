"""Chapter 10: fewer steps. Many proposers under one verifier, grammars, small caches, early exits."""
