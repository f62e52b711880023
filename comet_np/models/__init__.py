"""Models: a Config, `init`, `forward`, `backward`, one file each."""
