"""One script per data set; shards.py holds the format."""
