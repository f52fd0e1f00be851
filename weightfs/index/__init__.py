"""What weightfs remembers between mounts: layouts and inode numbers, in LMDB."""
