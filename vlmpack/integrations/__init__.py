"""Ways into other people's training code, one file each."""
