"""Posts in and out: shards, data sets, images, and the generated corpus."""
