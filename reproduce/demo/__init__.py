"""What `make demo` runs: attention transfer on handwritten digits."""
