"""What snapshots share: chunks of memory, each kept once, compressed and sealed."""
