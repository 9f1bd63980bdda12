"""Run descriptions: plain ml_collections files that import nothing heavy."""
