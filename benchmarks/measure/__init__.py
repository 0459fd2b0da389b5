"""How time, bytes, launches and memory are measured."""
