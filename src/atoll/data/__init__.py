"""Where data lives: catalogue at the site, resumable batches, SQL at the data."""
