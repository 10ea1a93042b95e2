"""The only door between sites: gate, channels."""
