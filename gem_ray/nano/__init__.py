"""The embedded default: small models, their recipe and their weights."""
