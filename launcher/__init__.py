"""The front door: command line, screen, status, dry run, doctor. Importing it loads no torch, Ray or pandas."""
