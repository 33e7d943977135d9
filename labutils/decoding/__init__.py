"""Decoding faster (chapter 10): many proposers under one verifier, grammars, small caches, early exits."""
