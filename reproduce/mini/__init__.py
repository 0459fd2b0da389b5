"""Tables 4 and 5 in minutes, on any folder of images."""
